"""The list of models: agrees with timm and with the table of files, and knows what is on this machine."""
import json

import pytest
import timm

from timm_itpn.cli import main
from timm_itpn.models import MODULES
from timm_itpn.weights.sources import SOURCES, drive_url, source_of

BASE = 'fast_itpn_base.mim_in1k'  # the one with a known hash


@pytest.fixture(autouse=True)
def nothing_cached(tmp_path, monkeypatch):
    """No files but those of the test."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    monkeypatch.delenv('TIMM_ITPN_WEIGHTS', raising=False)
    monkeypatch.delenv('TIMM_ITPN_HUB', raising=False)


def listed(capsys, *argv):
    """Models by name, from the JSON."""
    assert main(['list', *argv, '--json']) == 0
    captured = capsys.readouterr()
    assert captured.err == '' and captured.out.isascii()
    return {model['name']: model for model in json.loads(captured.out)}


def table(capsys, *argv):
    """Cells of the header and of each row."""
    assert main(['list', *argv]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith('params: with the number of classes in the row')
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in captured.out.splitlines()]


def test_all_models_are_listed_as_timm_creates_them_and_with_their_files(capsys):
    models = listed(capsys)
    assert list(models) == timm.list_models(module=MODULES, include_tags=True)
    for name in ('itpn_tiny', 'fast_itpn_tiny_fpn.mim_in1k', 'hivit_base.mae_in1k_ft_in1k'):
        model = timm.create_model(name, device='meta')
        assert models[name]['num_classes'] == model.num_classes
        assert models[name]['num_params'] == sum(p.numel() for p in model.parameters())
        assert models[name]['input_size'] == [3, 224, 224]
    for name, model in models.items():
        source = source_of(name)
        if source is None:
            assert '.' not in name and model['license'] == 'unknown'
            assert {model[key] for key in ('contents', 'drive_url', 'hub_repo', 'bytes', 'figures')} == {None}
            continue
        assert model['drive_url'] == drive_url(source) and source.drive_id in model['drive_url']
        for key in ('contents', 'license', 'bytes', 'sha256', 'figures'):
            assert model[key] == getattr(source, key)
        for key in ('file_name', 'hub_repo', 'hub_path', 'notes'):
            assert (model[key] or '') == getattr(source, key)
    assert set(SOURCES) <= set(models)


def test_table_says_the_same(capsys):
    header, _, *rows = table(capsys, '*base*')
    assert header == ['name', 'classes', 'params', 'input', 'weights', 'bytes', 'cached', 'SHA-256', 'license']
    cells = {name: line for name, *line in rows}
    assert cells[BASE] == [
        '0', '84,312,192', '3 x 224 x 224', 'Hub xche32/RELO', '180,830,695', 'no', 'known', 'unknown']
    assert cells['hivit_base.mae_in1k_ft_in1k'] == [
        '1,000', '66,418,952', '3 x 224 x 224', 'Google Drive', '', 'no', 'unknown', 'mit']


@pytest.mark.parametrize('pattern', ['*_fpn', 'hivit*', 'fast_itpn_base', '*.pixel_in1k', 'itpn_base.clip_in1k'])
def test_filter_is_that_of_timm(pattern, capsys):
    names = list(listed(capsys, pattern))
    assert names and names == timm.list_models(pattern, module=MODULES, include_tags=True)


@pytest.mark.parametrize('pattern', ['nope', 'resnet*'])
def test_nothing_found_is_one_sentence(pattern, capsys):
    for argv in ([], ['--json']):
        assert main(['list', pattern, *argv]) == 1
        captured = capsys.readouterr()
        assert captured.out == ''
        assert captured.err == f'timm-itpn: no model is named {pattern!r}: list them all with: timm-itpn list\n'


def test_file_on_this_machine_is_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('TIMM_ITPN_WEIGHTS', str(tmp_path))
    path = tmp_path / SOURCES[BASE].file_name
    path.write_bytes(b'x')
    models = listed(capsys, 'fast_itpn*')
    assert {name for name, model in models.items() if model['cached']} == {BASE, 'fast_itpn_base_fpn.mim_in1k'}
    assert models[BASE]['cached'] == str(path)
    assert {row[0]: row[6] for row in table(capsys, 'fast_itpn_base')[2:]} == {
        BASE: 'yes', 'fast_itpn_base.mim_in1k_ft_in21k': 'no'}
