"""Downloads from Google Drive, from a small one of our own that does all that a network does wrong."""
import errno
import hashlib
import io
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from support.drive_server import FILE_ID, QUOTA_PAGE, UUID, Drive, Fault, warning_page

from timm_itpn.weights import drive as client
from timm_itpn.weights.drive_page import Page

BY_HAND = (
    f'or get it from https://drive.google.com/file/d/{FILE_ID} with a browser and put it, by this name, in '
    'the folder that the environment variable TIMM_ITPN_WEIGHTS names.')
LIGHT = f"""
import importlib, os, sys, types
package = sys.modules['light'] = types.ModuleType('light')  # in place of timm_itpn.weights, which imports timm
package.__path__ = [{str(Path(client.__file__).parent)!r}]
drive = importlib.import_module('light.drive')
assert 'torch' not in sys.modules
drive.ENDPOINT, drive.PAUSES_S = sys.argv[1], (0.,) * 4
target = drive.Path(sys.argv[2])
"""
DOWNLOAD = LIGHT + f'print(drive.download({FILE_ID!r}, target))'


def weights(num_values, seed=0):
    buffer = io.BytesIO()
    torch.save({'a': torch.randn(num_values, generator=torch.Generator().manual_seed(seed))}, buffer)
    return buffer.getvalue()


CONTENT, OTHER = weights(65_000), weights(65_000, seed=1)
LONGER = weights(70_000)
SIZE = len(CONTENT)


@pytest.fixture
def server(monkeypatch):
    server = Drive(CONTENT)
    monkeypatch.setattr(client, 'ENDPOINT', server.endpoint)
    monkeypatch.setattr(client, 'PAUSES_S', (0.,) * 4)
    monkeypatch.setattr(client, 'TIMEOUT_S', 20.)
    yield server
    server.close()


@pytest.fixture
def target(tmp_path):
    return tmp_path / 'cache' / 'w.pt'


def fetch(target, sha256=None):
    return client.download(FILE_ID, target, sha256)


def fails(target, match, sha256=None):
    """The download ends in one sentence that names the way out, and leaves no target behind."""
    with pytest.raises(RuntimeError, match=match) as caught:
        fetch(target, sha256)
    message = str(caught.value)
    assert message.startswith('w.pt could not be downloaded, ') and message.endswith(BY_HAND)
    assert '\n' not in message
    assert not target.exists()
    return caught.value


def partial_of(target):
    return target.with_name('w.pt.incomplete')


def assert_done(target, content=CONTENT):
    assert target.read_bytes() == content
    assert os.listdir(target.parent) == ['w.pt']


# good ways

def test_download_happens_once_and_leaves_only_the_file(server, target):
    assert fetch(target, hashlib.sha256(CONTENT).hexdigest().upper()) == target
    assert_done(target)
    assert fetch(target) == target
    assert [asked.query for asked in server.asked] == [{'id': FILE_ID, 'export': 'download', 'confirm': 't'}]


def test_present_target_needs_neither_network_nor_a_writable_folder(server, target, monkeypatch):
    target.parent.mkdir()
    target.write_bytes(b'as it is')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert fetch(target).read_bytes() == b'as it is'
    assert server.asked == [] and os.listdir(target.parent) == ['w.pt']


def test_virus_warning_is_answered(server, target):
    server.warning = True
    server.faults = [Fault(), Fault(cut_at=SIZE // 2)]
    fetch(target)
    assert_done(target)
    assert [asked.query.get('uuid') for asked in server.asked] == [None, UUID, None, UUID]
    assert server.num_sent == SIZE


@pytest.mark.parametrize('content_type', ['text/html; charset=utf-8', 'application/json', None])
def test_bytes_count_more_than_the_content_type(content_type, server, target):
    server.faults = [Fault(headers={'Content-Type': content_type})]
    fetch(target)
    assert_done(target)


def test_redirects_are_followed(server, target):
    server.faults = [Fault(302, {'Location': f'/download?id={FILE_ID}&moved=1'}), Fault(cut_at=99_000)]
    fetch(target)
    assert_done(target)
    assert server.num_sent == SIZE


def test_slow_server_is_waited_for(server, target, monkeypatch):
    monkeypatch.setattr(client, 'TIMEOUT_S', .5)
    server.always = Fault(pause_s=.04)
    fetch(target)
    assert_done(target)


def test_file_of_untold_length_is_taken_if_it_is_whole(server, target):
    server.length = False
    fetch(target)
    assert_done(target)
    target.unlink()
    server.faults = [Fault(cut_at=SIZE // 2)]
    fails(target, 'what came is truncated or damaged: run it again in case')
    fetch(target)
    assert_done(target)


def test_progress_goes_to_stderr_and_can_be_switched_off(server, target, capfd):
    fetch(target)
    out, err = capfd.readouterr()
    assert out == '' and 'w.pt: 100%' in err
    script = DOWNLOAD.replace('print(', '(')
    args = [sys.executable, '-c', script, server.endpoint, str(target.parent / 'other.pt')]
    env = {**os.environ, 'HF_HUB_DISABLE_PROGRESS_BARS': '1'}
    done = subprocess.run(args, env=env, check=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ('', '')


# faults of the way

@pytest.mark.parametrize('reset', [False, True], ids=['end', 'reset'])
@pytest.mark.parametrize('ranges', [True, False], ids=['resumed', 'anew'])
def test_cuts_at_every_tenth_are_survived(ranges, reset, server, target):
    server.ranges = ranges
    server.faults = [Fault(cut_at=SIZE * tenth // 10, reset=reset) for tenth in range(1, 10)]
    fetch(target)
    assert_done(target)
    assert len(server.asked) == 10
    if ranges and not reset:
        assert [int(asked.start or 0) for asked in server.asked] == [SIZE * tenth // 10 for tenth in range(10)]


@pytest.mark.parametrize('etag', [True, False])
@pytest.mark.parametrize('last_modified', [True, False])
def test_resume_works_with_whatever_the_server_tells_of_the_file(etag, last_modified, server, target):
    server.etag, server.last_modified = etag, last_modified
    server.faults = [Fault(cut_at=SIZE // 2)]
    fetch(target)
    assert_done(target)
    assert server.num_sent == SIZE
    assert (server.asked[1].if_range or '')[:4] == ('"' + hashlib.md5(CONTENT).hexdigest()[:3] if etag else
                                                    'Mon,' if last_modified else '')


def test_download_goes_on_with_the_next_call(server, target):
    server.faults, server.always = [Fault(cut_at=SIZE // 2)], Fault(503)
    fails(target, r'failed again and again \(Google Drive answered 503\): run it again to go on, or')
    assert partial_of(target).read_bytes() == CONTENT[:SIZE // 2]
    server.always = Fault()
    fetch(target)
    assert_done(target)
    assert server.num_sent == SIZE


def test_same_cut_for_ever_is_given_up(server, target):
    server.always = Fault(cut_at=SIZE // 3)
    fails(target, rf'failed again and again \(it ended {SIZE - SIZE // 3} bytes too early\)')
    assert len(server.asked) == 5
    assert partial_of(target).stat().st_size == SIZE // 3


@pytest.mark.parametrize('status', [500, 503, 408])
def test_server_errors_are_retried(status, server, target):
    server.faults = [Fault(status)] * 3
    fetch(target)
    assert_done(target)


def test_server_error_for_ever_is_given_up(server, target):
    server.always = Fault(500)
    fails(target, r'\(Google Drive answered 500\): run it again to go on')
    assert len(server.asked) == 5


@pytest.mark.parametrize('status, said', [
    (404, 'answered 404, there is no such file: look'), (401, 'answered 401, the file is not public: ask'),
    (403, 'answered 403, .* fetched it lately: try'), (429, 'answered 429, too many requests .*: wait an hour'),
    (410, 'answered 410, it refuses: try')])
def test_refusals_are_final(status, said, server, target):
    server.faults = [Fault(status)]
    fails(target, said)
    assert len(server.asked) == 1


def test_stalled_connection_is_left_and_taken_up_again(server, target, monkeypatch):
    monkeypatch.setattr(client, 'TIMEOUT_S', .5)
    server.faults = [Fault(stall_at=SIZE // 2)]
    fetch(target)
    assert_done(target)
    assert server.num_sent == SIZE
    target.unlink()
    server.always = Fault(stall_at=0)
    fails(target, 'timed out')


def test_no_server_is_said(server, target, monkeypatch):
    monkeypatch.setattr(client, 'ENDPOINT', 'http://127.0.0.1:9/download')
    fails(target, r'failed again and again \(.*Connection refused\)')


def test_told_length_that_is_too_long_or_too_short_is_found(server, target):
    server.always = Fault(headers={'Content-Length': str(SIZE + 10)})
    server.ranges = False
    fails(target, 'it ended 10 bytes too early')
    server.always = Fault(headers={'Content-Length': str(SIZE - 10)})
    fails(target, 'what came is truncated or damaged: run it again')
    server.always = Fault()
    fetch(target)
    assert_done(target)


@pytest.mark.parametrize('location', ['/download?id=x', 'ftp://127.0.0.1/w.pt', 'file://{folder}/w.pt', 'http://['])
def test_redirects_that_lead_nowhere_or_astray_are_refused(location, server, target, tmp_path):
    (tmp_path / 'w.pt').write_bytes(CONTENT)
    server.always = Fault(302, {'Location': location.format(folder=tmp_path)})
    fails(target, 'endless or leads astray|Invalid IPv6 URL')


# pages

def test_quota_page_is_quoted(server, target):
    server.faults = [Fault(body=QUOTA_PAGE)]
    fails(target, r'web page instead of it \("Google Drive - Quota exceeded Sorry, you .* recently\."\): try again')
    assert len(server.asked) == 1


@pytest.mark.parametrize('fault', [
    Fault(body=b'\xef\xbb\xbf\n<html>\x1b[2J'), Fault(body=b'Sign in', headers={'Content-Type': 'text/html'}),
    Fault(body=b'', headers={'Content-Type': 'text/html'}), Fault(body=b'<html><title>' + b'\x1b[2J x' * 100_000)])
def test_other_pages_are_refused(fault, server, target):
    server.faults = [fault]
    message = str(fails(target, 'answered with a web page instead of it'))
    assert message.isprintable() and len(message) < 500


def test_page_after_the_warning_ends_it(server, target):
    server.faults = [Fault(body=warning_page(server.endpoint)), Fault(body=QUOTA_PAGE)]
    fails(target, 'Quota exceeded')
    server.always = Fault(body=warning_page(server.endpoint))
    fails(target, 'Virus scan warning')
    assert len(server.asked) == 4


def test_page_keeps_what_was_downloaded(server, target):
    server.faults = [Fault(cut_at=SIZE // 2), Fault(body=QUOTA_PAGE)]
    fails(target, 'Quota exceeded')
    fetch(target)
    assert server.num_sent == SIZE


def test_warning_that_leads_elsewhere_is_not_followed(server, target):
    server.faults = [Fault(body=warning_page(server.endpoint.replace('127.0.0.1', 'localhost')))]
    fails(target, 'Virus scan warning')
    assert len(server.asked) == 1


@pytest.mark.parametrize('action, followed', [
    ('https://drive.usercontent.google.com/download', True), ('/download?a=b#c', True),
    ('https://doc-0-1.docs.googleusercontent.com/download', True),
    ('http://drive.usercontent.google.com/download', False),
    ('https://evil-google.com/download', False), ('https://google.com.evil.com/', False),
    ('https://drive.google.com@evil.com/', False), ('file:///etc/passwd', False), ('ftp://ftp.google.com/', False),
    ('javascript:alert()', False), ('http://[', False)])
def test_forms_are_followed_only_to_google(action, followed):
    page = Page(warning_page(action), f'{client.ENDPOINT}?id=x', client.ENDPOINT)
    assert page.next_url.endswith(f'/download?id={FILE_ID}&export=download&confirm=t&uuid={UUID}') == followed
    assert bool(page.next_url) == followed
    assert page.said == 'Google Drive - Virus scan warning'


# wrong files

def test_wrong_hash_is_refused_and_nothing_kept(server, target):
    expected, found = (hashlib.sha256(content).hexdigest() for content in (OTHER, CONTENT))
    fails(target, rf'not the file that it should be \(SHA-256 expected: {expected}, found: {found}\): run', expected)
    assert os.listdir(target.parent) == ['w.pt.lock']
    fetch(target)
    assert_done(target)


@pytest.mark.parametrize('content', [b'', b'PK\3\4 and no more', b'{"error": 1}', CONTENT[:-1]])
def test_files_that_hold_no_weights_are_refused(content, server, target):
    server.content = content
    fails(target, 'what came is (empty|no weight file|truncated or damaged): run it again')
    assert os.listdir(target.parent) == ['w.pt.lock']


def change_after_a_request(server, content):
    send_file = server.send_file

    def send_and_change(*args):
        send_file(*args)
        server.content = content

    server.send_file = send_and_change


@pytest.mark.parametrize('new_run', [True, False])
@pytest.mark.parametrize('content, etag, if_range', [
    (OTHER, True, True), (OTHER, True, False), (LONGER, False, False), (LONGER, True, True),
    (CONTENT[:9000], True, False)])
def test_file_that_changed_in_between_is_fetched_anew(content, etag, if_range, new_run, server, target):
    server.etag, server.last_modified, server.if_range = etag, etag, if_range
    server.faults = [Fault(cut_at=SIZE // 2), Fault(404)]
    fails(target, '404')
    if new_run:
        server.content = content
    else:
        server.faults = [Fault(cut_at=SIZE * 3 // 4)]
        change_after_a_request(server, content)
    if content == CONTENT[:9000]:
        fails(target, 'truncated or damaged')
        return
    fetch(target)
    assert_done(target, content)


def test_change_that_nothing_tells_is_found_by_the_checksums(server, target):
    assert len(OTHER) == SIZE
    server.etag = server.last_modified = False
    server.faults = [Fault(cut_at=SIZE // 2), Fault(404)]
    fails(target, '404')
    server.content = OTHER
    fails(target, 'truncated or damaged')
    fetch(target)
    assert_done(target, OTHER)


@pytest.mark.parametrize('note', [None, '', '{"total"', '{}', '[]', '{"total": 5, "etag": "", "last_modified": ""}'])
def test_partial_file_of_unknown_origin_is_not_used(note, server, target):
    target.parent.mkdir()
    partial_of(target).write_bytes(OTHER[:50_000])
    if note is not None:
        target.with_name('w.pt.incomplete.json').write_text(note)
    fetch(target)
    assert_done(target)


# the disk and the settings

def test_offline_asks_nothing(server, target, monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    fails(target, 'HF_HUB_OFFLINE=1 forbids it: unset it, or')
    assert server.asked == [] and not target.parent.exists()


def test_folder_that_cannot_be_is_named(server, tmp_path):
    (tmp_path / 'file').write_text('')
    target = tmp_path / 'file' / 'cache' / 'w.pt'
    fails(target, rf'{target.parent} cannot be used \(Not a directory\): set TORCH_HOME or pass cache_dir= to use')


@pytest.mark.parametrize('number', [errno.EROFS, errno.EACCES, errno.EPERM])
def test_read_only_folder_is_named(number, server, target, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    for owner, name in ((Path, 'mkdir'), (client, 'WeakFileLock'), (Path, 'open')):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, refuse)
            fails(target, rf'cache cannot be used \({os.strerror(number)}\): set TORCH_HOME or pass cache_dir=')
    fetch(target)


def test_full_disk_is_said(server, target):
    target.parent.mkdir()
    partial_of(target).symlink_to('/dev/full')
    fails(target, rf'no space left in {target.parent} \(No space left on device\): free some and run it again')
    partial_of(target).unlink()
    fetch(target)
    assert_done(target)


@pytest.mark.parametrize('number', [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_disk_that_fills_up_keeps_what_came(number, server, target, monkeypatch):
    open_file = Path.open

    class Filling(io.FileIO):
        def write(self, data):
            if self.tell() > SIZE // 2:
                raise OSError(number, os.strerror(number))
            return super().write(data)

    def open_filling(path, mode='r', **kwargs):
        return Filling(path, mode) if mode == 'ab' else open_file(path, mode, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, 'open', open_filling)
        server.always = Fault(pause_s=.001)  # so that it comes in many pieces
        fails(target, 'no space left')
    num_kept = partial_of(target).stat().st_size
    assert 0 < num_kept < SIZE
    fetch(target)
    assert_done(target)
    assert int(server.asked[-1].start) == num_kept


def test_interrupt_passes_and_keeps_what_came(server, target, monkeypatch):
    server.faults = [Fault(cut_at=SIZE // 2)]
    with monkeypatch.context() as patch:
        def interrupt(_):
            raise KeyboardInterrupt

        patch.setattr(client.time, 'sleep', interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch(target)
    fetch(target)
    assert_done(target)
    assert server.num_sent == SIZE


# several processes

def start(server, target, script=DOWNLOAD):
    return subprocess.Popen(
        [sys.executable, '-c', script, server.endpoint, str(target)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_two_processes_download_one_file(server, target):
    server.always = Fault(pause_s=.1)
    processes = [start(server, target) for _ in range(2)]
    for process in processes:
        out, err = process.communicate()
        assert (process.returncode, out.decode().strip()) == (0, str(target)), err
    assert len(server.asked) == 1
    assert_done(target)


def test_process_can_be_killed_at_any_time(server, target):
    server.content = content = weights(1_000_000)
    server.always = Fault(pause_s=.004)
    chance = random.Random(0)
    for share in sorted(chance.random() for _ in range(10)):
        process = start(server, target)
        while server.num_sent < share * len(content) and process.poll() is None:
            time.sleep(.001)
        time.sleep(chance.uniform(0, .02))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not target.exists() or target.read_bytes() == content
    fetch(target)
    assert target.read_bytes() == content
    assert set(os.listdir(target.parent)) <= {'w.pt', 'w.pt.lock'}
    assert len(server.asked) > 5 and server.num_sent < 2 * len(content)  # it went on, did not begin anew each time


KILLED_AT_LINES = LIGHT + f"""
def trace(frame, event, arg):
    global countdown
    if 'weights/drive' not in frame.f_code.co_filename and 'weights/integrity' not in frame.f_code.co_filename:
        return None
    countdown -= event == 'line'
    if countdown <= 0:
        os.kill(os.getpid(), 9)
    return trace

drive.tqdm.monitor_interval = 0  # no thread of its own, for the fork
for line in range(1, 2000):
    child = os.fork()
    if child == 0:
        countdown = line
        sys.settrace(trace)
        drive.download({FILE_ID!r}, target.with_name(f'{{line}}.pt'))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status != 9:
        break
print(line, status)
"""


def test_process_can_be_killed_at_any_line(server, target):
    server.content = content = weights(100)
    process = start(server, target, KILLED_AT_LINES)
    out, err = process.communicate()
    last, status = map(int, out.split())
    assert status == 0 and last > 100, err
    for line in range(1, last + 1):
        file = target.with_name(f'{line}.pt')
        assert not file.exists() or file.read_bytes() == content
        assert fetch(file).read_bytes() == content
    left = {name.split('.', 1)[1] for name in os.listdir(target.parent)}
    assert left <= {'pt', 'pt.lock', 'pt.incomplete.json'}


def test_failure_gives_the_lock_back(server, target):
    server.faults = [Fault(404)]
    error = fails(target, '404')
    fetch(target)
    assert error.__traceback__ is not None  # it held the frames, and with them the lock of old versions, until here
