"""Hashes that the user has recorded: kept, used where none was published, never replaced in silence."""
import json
from pathlib import Path

import pytest

from timm_itpn.weights.records import expected_sha256, record, record_file
from timm_itpn.weights.sources import SOURCES

NAME, OTHER = 'fast_itpn_tiny.mim_in1k', 'itpn_base.pixel_in1k'
PUBLISHED = 'fast_itpn_base.mim_in1k'  # its hash is in the table
HASH = 'ab' * 32


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setenv('TIMM_ITPN_HASHES', str(tmp_path / 'new' / 'hashes.json'))
    return tmp_path / 'new' / 'hashes.json'


def test_record_file_is_the_one_named_or_in_the_configuration(monkeypatch):
    monkeypatch.setenv('TIMM_ITPN_HASHES', '/named/hashes.json')
    monkeypatch.setenv('XDG_CONFIG_HOME', '/config')
    assert record_file() == Path('/named/hashes.json')
    monkeypatch.delenv('TIMM_ITPN_HASHES')
    assert record_file() == Path('/config/timm_itpn/sha256.json')
    monkeypatch.setenv('XDG_CONFIG_HOME', '')
    monkeypatch.setenv('HOME', '/home/someone')
    assert record_file() == Path('/home/someone/.config/timm_itpn/sha256.json')


def test_nothing_is_known_and_written_without_a_record(path):
    assert {name for name in SOURCES if expected_sha256(name)} == {PUBLISHED}
    assert expected_sha256('itpn_tiny') is None
    assert not path.exists()


@pytest.mark.parametrize('name', [NAME, 'fast_itpn_tiny_fpn.mim_in1k'])
def test_record_is_that_of_both_models_of_the_file(name, path):
    assert record(name, HASH) == path
    assert expected_sha256(NAME) == expected_sha256('fast_itpn_tiny_fpn.mim_in1k') == HASH
    assert json.loads(path.read_text()) == {NAME: HASH}
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_records_are_kept_beside_each_other(path):
    record(NAME, HASH)
    record(OTHER, 'cd' * 32)
    record(NAME, HASH)  # once more, with the same
    assert json.loads(path.read_text()) == {NAME: HASH, OTHER: 'cd' * 32}


def test_known_hash_is_not_replaced(path):
    record(NAME, HASH)
    for name, known in ((NAME, HASH), (PUBLISHED, SOURCES[PUBLISHED].sha256)):
        with pytest.raises(ValueError, match=f'The known SHA-256 of {name} is {known}, this file has {"cd" * 32}'):
            record(name, 'cd' * 32)
        assert expected_sha256(name) == known


def test_published_hash_goes_before_a_record(path):
    path.parent.mkdir()
    path.write_text(json.dumps({PUBLISHED: HASH}))
    assert expected_sha256(PUBLISHED) == SOURCES[PUBLISHED].sha256


@pytest.mark.parametrize('name', ['itpn_tiny', 'fast_itpn_tiny', 'fast_itpn_tiny.unknown', 'resnet18.a1_in1k'])
def test_model_without_a_published_file_is_refused(name, path):
    with pytest.raises(ValueError, match=f'{name} has no published file'):
        record(name, HASH)
    assert not path.exists()


@pytest.mark.parametrize(('text', 'message'), [
    ('', 'is no JSON file'), ('{"a": ', 'is no JSON file'), ('[]', 'holds no names with hashes')])
def test_broken_record_is_an_error_and_stays(text, message, path):
    path.parent.mkdir()
    path.write_text(text)
    for call in (lambda: expected_sha256(NAME), lambda: record(NAME, HASH)):
        with pytest.raises(RuntimeError, match=f'{path} {message}.*: mend or remove it'):
            call()
    assert path.read_text() == text
