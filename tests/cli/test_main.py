"""The command line: data on stdout, errors as one sentence on stderr, and exit codes."""
import os
import subprocess
import sys

import pytest
from PIL import Image
from tqdm import tqdm

import timm_itpn
from timm_itpn.cli import main, recipe


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(['--version'])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f'timm-itpn {timm_itpn.__version__}\n'


def test_reader_that_has_gone_is_no_error():
    """`timm-itpn recipe | head`, with a reader that reads nothing."""
    reading, writing = os.pipe()
    os.close(reading)
    command = 'import sys; from timm_itpn.cli import main; sys.exit(main(["recipe", "fast_itpn_base"]))'
    done = subprocess.run([sys.executable, '-c', command], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b'')


@pytest.mark.parametrize('name, status', [('fast_itpn_base', 0), ('nosuch', 1)])
def test_output_that_is_closed_is_no_error(name, status):
    """`timm-itpn recipe >&- 2>&-`."""
    command = f'import sys; from timm_itpn.cli import main; sys.exit(main(["recipe", "{name}"]))'
    done = subprocess.run(['sh', '-c', 'exec "$0" -c "$1" >&- 2>&-', sys.executable, command])
    assert done.returncode == status


@pytest.mark.parametrize('argv, status', [(('recipe',), 0), (('recipe', 'nosuch'), 1), (('--nosuch',), 2)])
@pytest.mark.parametrize('stderr', ['/dev/full', 'no reader'])
def test_stderr_that_cannot_be_written_changes_nothing(argv, status, stderr, monkeypatch, capsys):
    def tell():
        for _ in tqdm(range(3), mininterval=0, file=sys.stderr):
            print(9_999 * 'x', file=sys.stderr)
        return ['done']

    monkeypatch.setattr(recipe, 'names', tell)
    reading, writing = os.pipe()
    os.close(reading)
    with open('/dev/full' if stderr == '/dev/full' else writing, 'w', buffering=1) as stream:
        monkeypatch.setattr('sys.stderr', stream)
        try:
            assert main(argv) == status
        except SystemExit as stop:
            assert stop.code == status
    assert capsys.readouterr().out == ('done\n' if status == 0 else '')


def test_any_file_name_is_printed(tmp_path, monkeypatch, capfdbinary):
    Image.new('RGB', (32, 32)).save(tmp_path / 'x.png')
    monkeypatch.chdir(os.fsencode(tmp_path))
    os.rename(b'x.png', b'\xff.png')
    assert main(['show', os.fsdecode(b'\xff.png')]) == 0
    assert capfdbinary.readouterr().out == b'\xff_show.png\n'


@pytest.mark.parametrize('error, said', [
    (ValueError('Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n'
                '  File "x.py", line 1\nValueError: no such: image\n'), 'no such: image\n'),
    (KeyError('x'), "KeyError: 'x' (in test_main.py, line "),
    (MemoryError(), 'MemoryError (in test_main.py, line '),
    (RuntimeError('two\n\tlines \x1b[2J'), 'two lines \\x1b[2J\n'),
    (OSError(28, 'No space left on device', 'x'), "[Errno 28] No space left on device: 'x'\n"),
])
def test_any_error_is_one_line(error, said, monkeypatch, capsys):
    def fail(*_):
        raise error
    monkeypatch.setattr(recipe, 'names', fail)
    assert main(['recipe']) == 1
    err = capsys.readouterr().err
    assert err.startswith(f'timm-itpn: {said}') and err.count('\n') == 1
