"""Where the weights of pretrained models come from, in which order, and what happens if a source fails."""
import hashlib
import io
import json
import logging
import re
import sys
import threading
import time
import types

import pytest
import timm
import torch
from huggingface_hub import constants, try_to_load_from_cache
from safetensors.torch import save
from support import drive_server, golden
from support.drive_server import QUOTA_PAGE
from support.hub_server import Fault

from timm_itpn.weights import fetch as fetching
from timm_itpn.weights import sources
from timm_itpn.weights.fetch import cached, fetch

pytestmark = pytest.mark.usefixtures('one_thread', 'small_models')

NAME = 'fast_itpn_tiny.mim_in1k'
SOURCE = sources.SOURCES[NAME]
HUB_FILE = (SOURCE.hub_repo, SOURCE.hub_path)
KEYS = golden.load('fast_itpn_tiny_mim')['keys']


def weights(seed=0, num_values=100_000):
    """Any weight file."""
    buffer = io.BytesIO()
    torch.save({'a': torch.randn(num_values, generator=torch.Generator().manual_seed(seed))}, buffer)
    return buffer.getvalue()


CONTENT, OTHER = weights(), weights(seed=1)


@pytest.fixture
def google(monkeypatch):
    """A Google Drive that has the file too, with other content."""
    return drive_server.Drive(OTHER, monkeypatch)


@pytest.fixture
def published(hub):
    hub.commit(SOURCE.hub_repo, {SOURCE.hub_path: CONTENT})
    return hub


def in_cache(folder):
    """Content of the file in the Hub's cache, None if it is not there."""
    path = try_to_load_from_cache(*HUB_FILE, cache_dir=folder)
    return open(path, 'rb').read() if isinstance(path, str) else None


# order

def test_sources_are_tried_in_order(hub, google, tmp_path, monkeypatch):
    own = tmp_path / 'own'
    own.mkdir()
    contents = [weights(seed) for seed in range(4)]
    (own / SOURCE.file_name).write_bytes(contents[0])
    monkeypatch.setenv('TIMM_ITPN_WEIGHTS', str(own))
    monkeypatch.setenv('TIMM_ITPN_HUB', 'someone')
    hub.commit(f'someone/{NAME}', {'model.safetensors': contents[1]})
    hub.commit(SOURCE.hub_repo, {SOURCE.hub_path: contents[2]})
    google.content = contents[3]
    for number, remove in enumerate([
            (own / SOURCE.file_name).unlink, lambda: hub.repos.pop(f'someone/{NAME}'), hub.repos.clear, lambda: None]):
        cache = tmp_path / str(number)
        assert cached(NAME, cache) == (own / SOURCE.file_name if number == 0 else None)
        path = fetch(NAME, cache)
        assert path.read_bytes() == contents[number]
        assert cached(NAME, cache) == path
        remove()


@pytest.mark.parametrize('name, files', [
    (NAME, [f'{NAME}.safetensors', f'{NAME}/model.safetensors', SOURCE.file_name]),
    ('fast_itpn_tiny_fpn.mim_in1k', ['fast_itpn_tiny_fpn.mim_in1k.safetensors', f'{NAME}/model.safetensors']),
    ('itpn_tiny', ['itpn_tiny.safetensors', 'itpn_tiny/model.safetensors']),
    ('itpn_base.clip_in1k', ['itpn_base.clip_in1k.pt']),
])
def test_folder_may_hold_converted_and_official_files(name, files, tmp_path, monkeypatch):
    monkeypatch.setenv('TIMM_ITPN_WEIGHTS', str(tmp_path))
    for file in reversed(files):  # the first one has priority
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
        assert fetch(name) == cached(name) == tmp_path / file


def test_missing_folder_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv('TIMM_ITPN_WEIGHTS', str(tmp_path / 'absent'))
    with pytest.raises(RuntimeError, match='TIMM_ITPN_WEIGHTS=.*absent is not a folder: correct or unset it'):
        timm.create_model('fast_itpn_tiny', pretrained=True)


def test_impossible_owner_is_said(monkeypatch):
    monkeypatch.setenv('TIMM_ITPN_HUB', 'https://huggingface.co/someone')
    for function in (fetch, cached):
        with pytest.raises(ValueError, match='Repo id must .*https://huggingface.co/someone'):
            function(NAME)


def test_sources_that_fail_are_named(hub, google, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv('TIMM_ITPN_WEIGHTS', str(tmp_path))
    monkeypatch.setenv('TIMM_ITPN_HUB', 'someone')
    google.page = QUOTA_PAGE
    pattern = (
        f'{NAME} could not be fetched. Hub someone/{NAME}: model.safetensors could not be downloaded .*404.* Hub '
        f'xche32/RELO: {SOURCE.hub_path} could not be downloaded .*404.* Google Drive: {SOURCE.file_name} could not be '
        'downloaded .*Too many users have viewed it recently.*: run it again, or get.*WEIGHTS names')
    with caplog.at_level(logging.INFO), pytest.raises(RuntimeError, match=pattern) as caught:
        fetch(NAME, tmp_path / 'cache')
    assert '\n' not in str(caught.value)
    assert f'{NAME} is not in TIMM_ITPN_WEIGHTS={tmp_path}' in caplog.text


def test_model_without_published_weights_has_none(monkeypatch, hub):
    assert fetch('itpn_tiny') is None and cached('itpn_tiny') is None
    with pytest.raises(RuntimeError, match='itpn_tiny has no published weights: create it without pretrained=True'):
        timm.create_model('itpn_tiny', pretrained=True)


def test_source_that_the_caller_names_has_priority(published, tmp_path, monkeypatch):
    monkeypatch.setenv('TIMM_ITPN_WEIGHTS', str(tmp_path))
    state_dict = timm.create_model('fast_itpn_tiny', num_classes=0).state_dict()
    torch.save({**state_dict, 'head.norm.bias': state_dict['head.norm.bias'] + 7}, tmp_path / 'w.pt')
    (tmp_path / f'{NAME}.safetensors').write_bytes(save(state_dict))
    for overlay, expected in ((None, 0), (dict(file=str(tmp_path / 'w.pt')), 7), (dict(state_dict=dict(
            torch.load(tmp_path / 'w.pt'))), 7)):
        model = timm.create_model('fast_itpn_tiny', pretrained=True, pretrained_cfg_overlay=overlay)
        assert (model.head.norm.bias == expected).all()


def test_scripts_that_hand_the_resolved_cfg_on_get_the_same_source(tmp_path, monkeypatch):
    """timm 1.0.31's scripts pass the whole cfg as a dict, which may have been through JSON."""
    monkeypatch.setenv('TIMM_ITPN_WEIGHTS', str(tmp_path))
    state_dict = timm.create_model('fast_itpn_tiny', num_classes=0).state_dict()
    (tmp_path / f'{NAME}.safetensors').write_bytes(save(state_dict))
    args = timm.models.resolve_model_input_args('fast_itpn_tiny')
    for cfg in (args['pretrained_cfg'], json.loads(json.dumps(args['pretrained_cfg']))):
        model = timm.create_model('fast_itpn_tiny', pretrained=True, pretrained_cfg=cfg)
        assert torch.equal(model.stages[2].pos_embed, state_dict['stages.2.pos_embed'])


# checks

@pytest.fixture
def known_hash(monkeypatch):
    """Makes a hash the known one."""
    def known(sha256):
        monkeypatch.setitem(sources.SOURCES, NAME, SOURCE._replace(sha256=sha256))
    return known


def test_known_hash_is_checked_wherever_the_file_is(published, google, known_hash, tmp_path, monkeypatch):
    model = timm.create_model('fast_itpn_tiny', num_classes=0)
    torch.save(model.state_dict(), tmp_path / SOURCE.file_name)
    content = (tmp_path / SOURCE.file_name).read_bytes()
    published.commit(SOURCE.hub_repo, {SOURCE.hub_path: content})
    hub_cache, drive_cache = tmp_path / 'hub', tmp_path / 'drive'
    path = fetch(NAME, hub_cache)
    drive_cache.mkdir()
    (drive_cache / SOURCE.file_name).write_bytes(content)

    def create(**kwargs):
        return timm.create_model('fast_itpn_tiny', pretrained=True, **kwargs)

    def by_folder():
        monkeypatch.setenv('TIMM_ITPN_WEIGHTS', str(tmp_path))
        return create()

    ways = dict(
        file=lambda: create(pretrained_cfg_overlay=dict(file=str(tmp_path / SOURCE.file_name))),
        hub_cache=lambda: create(cache_dir=hub_cache), drive_cache=lambda: create(cache_dir=drive_cache),
        folder=by_folder)
    known_hash(hashlib.sha256(content).hexdigest())
    before = sources._sha256.cache_info()
    for way in 2 * ['file']:
        assert torch.equal(ways[way]().stages[2].pos_embed, model.stages[2].pos_embed)
    after = sources._sha256.cache_info()
    assert after.misses == before.misses + 1 and after.hits > before.hits  # a file is read once for it
    known_hash('0' * 64)
    google.page = QUOTA_PAGE
    for way, create_so in ways.items():
        if way == 'drive_cache':
            published.repos.clear()
        with pytest.raises((ValueError, RuntimeError), match='its SHA-256 is [0-9a-f]{64}, not 0{64}'):
            create_so()
    assert path.exists() and (drive_cache / SOURCE.file_name).exists()
    (tmp_path / SOURCE.file_name).rename(tmp_path / 'mine.pt')  # as the message says
    create(pretrained_cfg_overlay=dict(file=str(tmp_path / 'mine.pt')))


def large_files(folder):
    return [path for path in folder.rglob('*') if path.is_file() and path.stat().st_size > 1000]


def test_file_of_another_hash_is_not_kept(published, google, known_hash, tmp_path):
    known_hash('0' * 64)
    with pytest.raises(RuntimeError, match='Hub.* not the published file .*its SHA-256 is .*Drive.* not the published'):
        fetch(NAME, tmp_path)
    assert not large_files(tmp_path)
    known_hash(hashlib.sha256(OTHER).hexdigest())
    assert fetch(NAME, tmp_path).read_bytes() == OTHER


def test_file_that_was_there_before_is_not_deleted(published, google, known_hash, tmp_path):
    path = fetch(NAME, tmp_path)
    known_hash('0' * 64)
    google.page = QUOTA_PAGE
    with pytest.raises(RuntimeError, match=f'{path} is not the published file.*: pass cache_dir= to download into'):
        fetch(NAME, tmp_path)
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize('offline', [True, False])
def test_damaged_file_in_the_cache_is_noticed(offline, published, google, tmp_path, monkeypatch):
    """As a process leaves it that is killed between download and check."""
    path = fetch(NAME, tmp_path)
    path.write_bytes(CONTENT[:-9])
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', offline)
    if offline:
        with pytest.raises(RuntimeError, match=f'{path} is truncated, damaged or .*: go online .* without HF_HUB_OFF'):
            fetch(NAME, tmp_path)
        assert path.exists()
    else:
        assert fetch(NAME, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize('content', [b'<!DOCTYPE html><html>Sign in</html>', CONTENT[:50_000], b'', b'version https'])
def test_bad_file_on_the_hub_is_not_kept(content, hub, google, tmp_path):
    hub.commit(SOURCE.hub_repo, {SOURCE.hub_path: content})
    assert fetch(NAME, tmp_path).read_bytes() == OTHER  # from the next place
    assert in_cache(tmp_path) is None


# a hostile Hub

FAULTS = {
    '503 at the head': [Fault(method='HEAD', status=503, headers={'Retry-After': '0'})],
    'slow': [Fault(pause_s=.001)],
    'redirect': [Fault(method='(GET|HEAD)', redirect='relative')] * 2,
    'cut': [Fault(cut_after=len(CONTENT) // 2)],
    'page': [Fault(body=b'<html>busy</html>', headers={'Content-Type': 'text/html'})],
    '404': [Fault(method='HEAD', status=404, headers={'X-Error-Code': 'EntryNotFound'})],
    '403': [Fault(method='(GET|HEAD)', status=403)] * 9,
    'cut for ever': [Fault(cut_after=0)] * 50,
}
REFUSED = {'page': 'web page|Consistency', '404': '404', '403': '403', 'cut for ever': ''}  # what is said


@pytest.mark.parametrize('fault', FAULTS)
def test_faults_of_the_hub(fault, published, google, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)
    google.page = QUOTA_PAGE
    published.faults += FAULTS[fault]
    if fault in REFUSED:
        with pytest.raises(RuntimeError) as caught:
            fetch(NAME, tmp_path)
        message = str(caught.value)
        assert f'{NAME} could not be fetched. Hub xche32/RELO: {SOURCE.hub_path} ' in message and '\n' not in message
        assert re.search(REFUSED[fault], message) and 'check your connection' not in message
        assert in_cache(tmp_path) is None
    else:
        assert fetch(NAME, tmp_path).read_bytes() == CONTENT
    published.faults.clear()
    assert fetch(NAME, tmp_path).read_bytes() == CONTENT


# Google Drive

@pytest.fixture
def no_hub_copy(hub):
    pytest.importorskip('gdown')


@pytest.mark.parametrize('content', [b'<!DOCTYPE html><html>Sign in</html>', CONTENT[:50_000], b'hello', b'\x80\x02}.'])
def test_bad_file_from_drive_is_not_kept(content, no_hub_copy, google, tmp_path):
    google.content = content
    with pytest.raises(RuntimeError, match='what came is .*, and was not kept.*: run it again') as error:
        fetch(NAME, tmp_path)
    assert '\n' not in str(error.value) and not large_files(tmp_path)
    google.content = CONTENT
    assert fetch(NAME, tmp_path).read_bytes() == CONTENT
    assert large_files(tmp_path) == [tmp_path / SOURCE.file_name]


@pytest.mark.parametrize('by_then', ['the same file', 'another', 'a shorter one'])
def test_download_from_drive_goes_on_where_it_broke_off(by_then, no_hub_copy, google, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, 'DRIVE_RETRIES', 0)
    google.content = weights(num_values=400_000)
    google.faults.append(Fault(path='/uc', cut_after=1_000_000))
    with pytest.raises(RuntimeError, match='Download is incomplete.*: run it again'):
        fetch(NAME, tmp_path)
    if by_then != 'the same file':
        google.content = weights(seed=1, num_values=400_000 if by_then == 'another' else 10_000)
        with pytest.raises(RuntimeError, match='byte range|was not kept'):  # by gdown or by the checksums
            fetch(NAME, tmp_path)
    assert fetch(NAME, tmp_path).read_bytes() == google.content
    assert (google.starts[-1] == 'bytes=524288-') == (by_then == 'the same file')  # gdown writes pieces of 512 KiB


def test_processes_at_once_download_from_drive_once(no_hub_copy, google, tmp_path):
    google.faults.append(Fault(path='/uc', pause_s=.001))
    found = []
    threads = [threading.Thread(target=lambda: found.append(fetch(NAME, tmp_path))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / SOURCE.file_name] * 3 and google.starts == ['0']
    assert found[0].read_bytes() == OTHER


@pytest.mark.parametrize('found', [types.ModuleType('gdown'), None])
def test_missing_or_old_gdown_is_said_with_all_ways_out(found, no_hub_copy, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'gdown', found)
    ways = [
        r"gdown >= 6: pip install 'timm-itpn\[drive\]'", f'https://drive.google.com/file/d/{SOURCE.drive_id}',
        'TIMM_ITPN_WEIGHTS']
    with pytest.raises(RuntimeError, match='.*'.join(ways)):
        fetch(NAME, tmp_path)
