"""What the README files and the pages beside them print is run: python blocks, and bash blocks marked `<!-- test -->`.

The blocks of one file run in their order, in one folder; its python blocks share their variables. Commands are those of
the environment that runs the tests. `python` blocks cannot be left out: what cannot run offline is not one.
"""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
READMES = sorted([ROOT / 'README.md', *ROOT.glob('src/timm_itpn/*/*.md')])
LINK = re.compile(r'\]\((?!https?://)([^)#]+)')
BLOCK = re.compile(r'^(?P<marker><!-- test -->\n+)?```(?P<language>\w+)\n(?P<code>.*?)^```$', re.DOTALL | re.MULTILINE)


def blocks(text):
    """Language, line number and code of the blocks that are run."""
    for match in BLOCK.finditer(text):
        language = match['language']
        if language == 'python' or language == 'bash' and match['marker']:
            yield language, text[:match.start('code')].count('\n') + 1, match['code']


def named(paths):
    return pytest.mark.parametrize('readme', paths, ids=lambda path: str(path.relative_to(ROOT)))


@pytest.mark.usefixtures('one_thread')
@named([path for path in READMES if any(blocks(path.read_text()))])
def test_readme_runs_as_printed(readme, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('PATH', str(Path(sys.executable).parent), prepend=os.pathsep)
    namespace = {'__name__': '__main__'}
    for language, line, code in blocks(readme.read_text()):
        if language == 'python':
            source = '\n' * (line - 1) + code  # tracebacks show the line of the README
            exec(compile(source, readme, 'exec', dont_inherit=True), namespace)
        else:
            done = subprocess.run(['bash', '-euo', 'pipefail', '-c', code], capture_output=True, text=True)
            assert done.returncode == 0, f'{readme}:{line}: {code}{done.stderr}'


@named(READMES)
def test_links_and_pictures_exist(readme):
    missing = [link for link in LINK.findall(readme.read_text()) if not (readme.parent / link).exists()]
    assert not missing


def test_blocks_are_found_by_language_and_marker():
    text = 'a\n```python\nx = 1\n```\n```bash\nfalse\n```\n<!-- test -->\n```bash\ntrue\n```\n```text\n```python\n```\n'
    assert list(blocks(text)) == [('python', 3, 'x = 1\n'), ('bash', 10, 'true\n')]
