"""Where the weights of pretrained models come from, in which order, and what happens if a place fails."""
import io
import json
import logging
import random
import signal
import subprocess
import sys
import time
from os import kill

import pytest
import timm
import torch
from huggingface_hub import constants, try_to_load_from_cache
from safetensors.torch import save
from support import drive_server, golden
from support.hub_server import Fault

from timm_itpn.weights import drive, sources
from timm_itpn.weights.fetch import cached, fetch
from timm_itpn.weights.layout import official_to_native

pytestmark = pytest.mark.usefixtures('one_thread')

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
    server = drive_server.Drive(OTHER)
    monkeypatch.setattr(drive_server, 'FILE_ID', SOURCE.drive_id)
    monkeypatch.setattr(drive, 'ENDPOINT', server.endpoint)
    yield server
    server.close()


@pytest.fixture
def published(hub):
    hub.commit(SOURCE.hub_repo, {SOURCE.hub_path: CONTENT})
    return hub


def in_cache(folder):
    """Content of the file in the Hub's cache, None if it is not there."""
    path = try_to_load_from_cache(*HUB_FILE, cache_dir=folder)
    return open(path, 'rb').read() if isinstance(path, str) else None


# order

def test_places_are_tried_in_order(hub, google, tmp_path, monkeypatch):
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


def test_folder_that_is_none_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv('TIMM_ITPN_WEIGHTS', str(tmp_path / 'absent'))
    with pytest.raises(RuntimeError, match='TIMM_ITPN_WEIGHTS=.*absent is no folder: correct or unset it'):
        timm.create_model('fast_itpn_tiny', pretrained=True)


def test_owner_that_is_none_is_said(monkeypatch):
    monkeypatch.setenv('TIMM_ITPN_HUB', 'https://huggingface.co/someone')
    for function in (fetch, cached):
        with pytest.raises(RuntimeError, match='TIMM_ITPN_HUB=.* is no user or organisation: correct or unset it'):
            function(NAME)


def test_places_that_fail_are_named(hub, google, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv('TIMM_ITPN_WEIGHTS', str(tmp_path))
    monkeypatch.setenv('TIMM_ITPN_HUB', 'someone')
    google.always = drive_server.Fault(status=404)
    pattern = (
        f'{NAME} could not be fetched. Hub someone/{NAME}: model.safetensors cannot be had from the Hub .*404.*: check '
        f'name and revision. Hub xche32/RELO: {SOURCE.hub_path} cannot be had from the Hub .*404.* Google Drive: '
        f'{SOURCE.file_name} could not be downloaded, .* 404, there is no such file: .*TIMM_ITPN_WEIGHTS names')
    with caplog.at_level(logging.INFO), pytest.raises(RuntimeError, match=pattern) as caught:
        fetch(NAME, tmp_path / 'cache')
    assert '\n' not in str(caught.value)
    assert f'{NAME} is not in TIMM_ITPN_WEIGHTS={tmp_path}' in caplog.text


def test_no_place_is_none(monkeypatch, hub):
    assert fetch('itpn_tiny') is None and cached('itpn_tiny') is None
    with pytest.raises(RuntimeError, match='itpn_tiny has no published weights: create it without pretrained=True'):
        timm.create_model('itpn_tiny', pretrained=True)


def test_models_of_every_place_have_its_weights(hub, google, tmp_path, monkeypatch):
    state_dict = {key: torch.zeros(shape, dtype=torch.float16) for key, shape in KEYS}

    def official(number):
        buffer = io.BytesIO()
        torch.save({'model': dict(state_dict, pos_embed=state_dict['pos_embed'] + number)}, buffer)
        return buffer.getvalue()

    native = {key: value.contiguous() for key, value in official_to_native(state_dict).items()}
    own = tmp_path / 'own'
    own.mkdir()
    (own / f'{NAME}.safetensors').write_bytes(save(native))
    native['stages.2.pos_embed'] = native['stages.2.pos_embed'] + 1
    hub.commit(f'someone/{NAME}', {'model.safetensors': save(native)})
    hub.commit(SOURCE.hub_repo, {SOURCE.hub_path: official(2)})
    google.content = official(3)
    for number, change in enumerate([
            lambda: monkeypatch.setenv('TIMM_ITPN_WEIGHTS', str(own)),
            lambda: (monkeypatch.delenv('TIMM_ITPN_WEIGHTS'), monkeypatch.setenv('TIMM_ITPN_HUB', 'someone')),
            lambda: monkeypatch.delenv('TIMM_ITPN_HUB'),
            hub.repos.clear]):
        change()
        for name, args in (('fast_itpn_tiny', dict(num_classes=3)), ('fast_itpn_tiny_fpn', dict(pyramid=True))):
            model = timm.create_model(name, pretrained=True, cache_dir=tmp_path / str(number), **args)
            assert (model.stages[2].pos_embed == number).all()
            assert model.pyramid is None or (model.pyramid.levels[2].align.weight == 0).all()


def test_place_that_the_caller_names_has_priority(published, tmp_path, monkeypatch):
    monkeypatch.setenv('TIMM_ITPN_WEIGHTS', str(tmp_path))
    state_dict = timm.create_model('fast_itpn_tiny', num_classes=0).state_dict()
    torch.save({**state_dict, 'head.norm.bias': state_dict['head.norm.bias'] + 7}, tmp_path / 'w.pt')
    (tmp_path / f'{NAME}.safetensors').write_bytes(save(state_dict))
    for overlay, expected in ((None, 0), (dict(file=str(tmp_path / 'w.pt')), 7), (dict(state_dict=dict(
            torch.load(tmp_path / 'w.pt'))), 7)):
        model = timm.create_model('fast_itpn_tiny', pretrained=True, pretrained_cfg_overlay=overlay)
        assert (model.head.norm.bias == expected).all()


def test_scripts_that_hand_the_resolved_cfg_on_get_the_same_places(tmp_path, monkeypatch):
    """timm 1.0.31's scripts pass the whole cfg as a dict, which may have been through JSON."""
    monkeypatch.setenv('TIMM_ITPN_WEIGHTS', str(tmp_path))
    state_dict = timm.create_model('fast_itpn_tiny', num_classes=0).state_dict()
    (tmp_path / f'{NAME}.safetensors').write_bytes(save(state_dict))
    args = timm.models.resolve_model_input_args('fast_itpn_tiny')
    for cfg in (args['pretrained_cfg'], json.loads(json.dumps(args['pretrained_cfg']))):
        model = timm.create_model('fast_itpn_tiny', pretrained=True, pretrained_cfg=cfg)
        assert torch.equal(model.stages[2].pos_embed, state_dict['stages.2.pos_embed'])


# checks

def test_known_hash_is_checked_and_another_file_not_kept(published, google, tmp_path, monkeypatch):
    hashes = tmp_path / 'hashes.json'
    monkeypatch.setenv('TIMM_ITPN_HASHES', str(hashes))
    hashes.write_text(json.dumps({NAME: '0' * 64}))
    with pytest.raises(RuntimeError, match='another file than expected: its SHA-256 is .*, not 0{64}; it was not kept'):
        fetch(NAME, tmp_path / 'cache')
    assert not [path for path in (tmp_path / 'cache').rglob('*') if path.is_file() and path.stat().st_size > 1000]
    hashes.unlink()
    assert fetch(NAME, tmp_path / 'cache').read_bytes() == CONTENT


def test_file_that_was_there_before_is_not_deleted(published, google, tmp_path, monkeypatch):
    path = fetch(NAME, tmp_path / 'cache')
    monkeypatch.setenv('TIMM_ITPN_HASHES', str(tmp_path / 'hashes.json'))
    (tmp_path / 'hashes.json').write_text(json.dumps({NAME: '0' * 64}))
    google.always = drive_server.Fault(status=404)
    with pytest.raises(RuntimeError, match=f'{path} has the SHA-256 .* as expected: remove or rename it'):
        fetch(NAME, tmp_path / 'cache')
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize('offline', [True, False])
def test_damaged_file_in_the_cache_is_noticed(offline, published, google, tmp_path, monkeypatch):
    """As a process leaves it that is killed between download and check."""
    path = fetch(NAME, tmp_path)
    path.write_bytes(CONTENT[:-9])
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', offline)
    if offline:
        with pytest.raises(RuntimeError, match=f'{path} is truncated or damaged: go online once without HF_HUB_OFF'):
            fetch(NAME, tmp_path)
        assert path.exists()
    else:
        assert fetch(NAME, tmp_path).read_bytes() == CONTENT


def test_without_a_home_nothing_is_recorded(published, tmp_path, monkeypatch):
    def home():
        raise RuntimeError('Could not determine home directory.')
    monkeypatch.delenv('XDG_CONFIG_HOME', raising=False)
    monkeypatch.setattr('pathlib.Path.home', home)
    assert fetch(NAME, tmp_path).read_bytes() == CONTENT


def test_published_hash_counts_without_a_record():
    from timm_itpn.weights.records import expected_sha256
    assert expected_sha256('fast_itpn_base_fpn.mim_in1k') == sources.SOURCES['fast_itpn_base.mim_in1k'].sha256
    assert expected_sha256(NAME) is None


@pytest.mark.parametrize('content', [b'<!DOCTYPE html><html>Sign in</html>', CONTENT[:50_000], b'', b'version https'])
def test_bad_file_on_the_hub_is_not_kept(content, hub, google, tmp_path):
    hub.commit(SOURCE.hub_repo, {SOURCE.hub_path: content})
    assert fetch(NAME, tmp_path).read_bytes() == OTHER  # from the next place
    assert in_cache(tmp_path) is None


# a hostile Hub

FAULTS = {
    '500 then good': [Fault(status=500)],
    '503 at the head': [Fault(method='HEAD', status=503, headers={'Retry-After': '0'})] * 50,
    'slow': [Fault(pause_s=.001)],
    'wrong content type': [Fault(method='(GET|HEAD)', headers={'Content-Type': 'text/html'})] * 2,
    'redirect': [Fault(method='(GET|HEAD)', redirect='relative')] * 2,
    **{f'cut at {tenth} tenths': [Fault(cut_after=len(CONTENT) * tenth // 10)] for tenth in range(10)},
    'page': [Fault(body=b'<html>busy</html>', headers={'Content-Type': 'text/html'})],
    'page for ever': [Fault(body=b'<html>busy</html>', headers={'Content-Type': 'text/html'})] * 50,
    '404': [Fault(method='HEAD', status=404, headers={'X-Error-Code': 'EntryNotFound'})],
    '401': [Fault(method='HEAD', status=401)],
    '403': [Fault(status=403)],
    '500 for ever': [Fault(status=500)] * 50,
    'cut for ever': [Fault(cut_after=0)] * 50,
}


REFUSED = ('503 at the head', 'page for ever', '404', '401', '403', '500 for ever', 'cut for ever')


@pytest.mark.parametrize('fault', FAULTS)
def test_faults_of_the_hub(fault, published, google, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)
    google.always = drive_server.Fault(status=404)
    published.faults += FAULTS[fault]
    if fault in REFUSED:
        with pytest.raises(RuntimeError) as caught:
            fetch(NAME, tmp_path)
        message = str(caught.value)
        assert f'{NAME} could not be fetched. Hub xche32/RELO: {SOURCE.hub_path} ' in message and '\n' not in message
        assert in_cache(tmp_path) is None
    else:
        assert fetch(NAME, tmp_path).read_bytes() == CONTENT
    published.faults.clear()
    assert fetch(NAME, tmp_path).read_bytes() == CONTENT


def test_impossible_cache_is_said(published, google, tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(RuntimeError, match='cannot be stored .*: free space there, or name another fol'):
        fetch(NAME, tmp_path / 'file' / 'cache')


# processes

CHILDREN = f"""
import os, resource, sys
from timm_itpn.weights import drive, fetch
drive.ENDPOINT, drive.PAUSES_S = 'http://127.0.0.1:9/download', ()
for line in sys.stdin:
    ready, go = os.pipe()
    pid = os.fork()
    if not pid:
        os.read(ready, 1)  # until its number is printed
        if line.strip() == 'full':  # as a full disk: no file may grow beyond this
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            fetch.fetch({NAME!r}, sys.argv[1])
        except RuntimeError as error:
            print(error, flush=True)
        os._exit(0)
    print(pid, flush=True)
    os.write(go, b'!')
"""


@pytest.fixture
def children(tmp_path):
    """Starts processes that fetch, at once: a process that has imported everything forks them."""
    parent = subprocess.Popen(
        [sys.executable, '-c', CHILDREN, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(how='plain'):
        parent.stdin.write(f'{how}\n')
        parent.stdin.flush()
        return int(parent.stdout.readline())

    start.output = parent.stdout
    yield start
    parent.kill()
    parent.communicate()


def test_killed_downloads_never_leave_a_bad_file(children, published, tmp_path):
    moments = random.Random(0)
    for _ in range(10):
        published.faults[:] = [Fault(pause_s=.002)]  # 0.8 s for all
        child = children()
        time.sleep(moments.uniform(0, .6))
        kill(child, signal.SIGKILL)
        assert in_cache(tmp_path) in (None, CONTENT)
    published.faults.clear()
    assert fetch(NAME, tmp_path).read_bytes() == CONTENT == in_cache(tmp_path)


def test_two_processes_at_once_end_with_one_good_file(children, published, tmp_path):
    published.faults[:] = [Fault(pause_s=.002)]
    children()
    children()
    deadline = time.monotonic() + 60
    while in_cache(tmp_path) is None and time.monotonic() < deadline:
        time.sleep(.05)
    assert in_cache(tmp_path) == CONTENT
    assert fetch(NAME, tmp_path).read_bytes() == CONTENT
    assert published.downloads == [HUB_FILE]


def test_full_disk_is_said(children, published, tmp_path):
    children('full')
    assert 'cannot be stored (' in children.output.readline()
    assert in_cache(tmp_path) is None
    assert fetch(NAME, tmp_path).read_bytes() == CONTENT
