"""What the README files and the pages beside them print is run: python blocks, and bash blocks marked `<!-- test -->`.

Each runs alone in this process, with variables and a folder of its own; tiny models are small where a block does not
say their width. That the command is installed under its name is seen by `.ci/run`. `python` blocks cannot be left out:
what cannot run offline is not one.
"""
import re
import shlex
from pathlib import Path

import PIL.Image
import pytest
from timm.data import rand_augment_transform

from timm_itpn.cli import main

ROOT = Path(__file__).parents[1]
READMES = sorted([ROOT / 'README.md', *ROOT.glob('src/timm_itpn/*/*.md')])
LINK = re.compile(r'\]\((?!https?://)([^)#]+)')
BLOCK = re.compile(r'^(?P<marker><!-- test -->\n+)?```(?P<language>\w+)\n(?P<code>.*?)^```$', re.DOTALL | re.MULTILINE)

WIDTH = re.compile(r'^[^#\n]*\b(256|384)\b', re.MULTILINE)  # of the pyramid, of stage 3; not in comments


def blocks(text):
    """Language, line number and code of the blocks that are run."""
    for match in BLOCK.finditer(text):
        language = match['language']
        if language == 'python' or language == 'bash' and match['marker']:
            yield language, text[:match.start('code')].count('\n') + 1, match['code']


def printed():
    return [
        pytest.param(path, *block, id=f'{path.relative_to(ROOT)}:{block[1]}')
        for path in READMES for block in blocks(path.read_text())]


def run_python(code, readme='-c'):
    exec(compile(code, readme, 'exec', dont_inherit=True), {'__name__': '__main__'})


@pytest.mark.usefixtures('one_thread')
@pytest.mark.parametrize('readme, language, line, code', printed())
def test_block_runs_as_printed(readme, language, line, code, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    if not WIDTH.search(code):
        request.getfixturevalue('small_models')
    if language == 'python':
        run_python('\n' * (line - 1) + code, readme)  # tracebacks show the line of the README
        return
    for command in code.splitlines():
        program, *args = shlex.split(command, comments=True)
        if program == 'timm-itpn':
            assert main(args) == 0, f'{readme}:{line}: {command}'
        else:
            assert [program, args[0]] == ['python', '-c'] and len(args) == 2, command
            run_python(args[1])


@pytest.mark.parametrize('readme', READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_pictures_exist(readme):
    missing = [link for link in LINK.findall(readme.read_text()) if not (readme.parent / link).exists()]
    assert not missing


def test_blocks_are_found_by_language_and_marker():
    text = 'a\n```python\nx = 1\n```\n```bash\nfalse\n```\n<!-- test -->\n```bash\ntrue\n```\n```text\n```python\n```\n'
    assert list(blocks(text)) == [('python', 3, 'x = 1\n'), ('bash', 10, 'true\n')]


@pytest.mark.skipif(int(PIL.__version__.partition('.')[0]) > 12, reason='Pillow is newer than the extras install')
def test_augmentation_of_the_recipes_takes_the_largest_magnitude():
    policies = {line.split()[1] for path in ROOT.glob('src/timm_itpn/recipes/*.yaml')
                for line in path.read_text().splitlines() if line.startswith('aa:')}
    for policy in policies:
        for op in rand_augment_transform(policy).ops:
            op.prob, op.magnitude, op.magnitude_std = 1., 10, 0.  # which normal noise on 9 reaches in 2 of 100 draws
            assert op(PIL.Image.new('RGB', (8, 8))).size == (8, 8)
