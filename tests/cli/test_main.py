"""The command line: data on stdout, errors as one sentence on stderr, and exit codes."""
import pytest

import timm_itpn
from timm_itpn.cli import main


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(['--version'])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f'timm-itpn {timm_itpn.__version__}\n'


@pytest.mark.parametrize('argv', [[], ['fly'], ['demo', '--epochs', 'many']])
def test_wrong_usage_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert 'usage: timm-itpn' in capsys.readouterr().err
