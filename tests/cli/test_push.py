"""Publishing on the Hub: what goes up, that it comes back as the same model, and that a failure leaves no commit."""
import hashlib
import os
import shutil
from functools import partial

import huggingface_hub
import pytest
import timm
import torch
from support.hub_server import TOKEN, Fault
from support.small import FAMILIES, images, small_model
from timm.models import save_for_hf

from timm_itpn import __version__
from timm_itpn.cli import main, push

pytestmark = pytest.mark.usefixtures('one_thread')

REPO = 'someone/small.in1k'
CARD = '---\nlibrary_name: timm\nlicense: mit\n---\n# A small model\n'


def write(model, folder):
    save_for_hf(model, folder, safe_serialization=True)
    (folder / 'README.md').write_text(CARD)
    return folder


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    return write(small_model('fast_itpn_tiny'), tmp_path_factory.mktemp('written'))


@pytest.fixture
def folder(written, tmp_path, monkeypatch):
    """A folder `model` as convert writes it, in the current folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(written, tmp_path / 'model')
    return tmp_path / 'model'


@pytest.fixture
def token(monkeypatch):
    monkeypatch.setenv('HF_TOKEN', TOKEN)


def logits(model):
    with torch.inference_mode():
        return model.eval()(images(2, 3, 64, 64))


def num_commits(hub):
    return len(hub.repos[REPO].commits) - 1 if REPO in hub.repos else 0  # without that of create_repo


def error(capsys):
    captured = capsys.readouterr()
    _, name, sentence = captured.err.splitlines()[-1].partition('timm-itpn: ')  # a progress bar may stand before it
    assert captured.out == '' and name
    return name + sentence


def test_dry_run_says_all_and_sends_nothing(hub, folder, capsys):
    hub.faults.append(Fault(method='POST'))  # would be taken by any request to write
    assert main(['push', 'model', REPO]) == 0
    captured = capsys.readouterr()
    card, config, weights = [(folder / name).read_bytes() for name in push.FILES]
    assert captured.out.splitlines() == [
        f'repository         {REPO}',
        'revision           main',
        f'README.md          {len(card)} bytes',
        f'config.json        {len(config):,} bytes',
        f'model.safetensors  {len(weights):,} bytes, SHA-256 {hashlib.sha256(weights).hexdigest()}',
    ]
    assert captured.err == f'nothing was sent; upload it with: timm-itpn push model {REPO} --yes\n'
    assert hub.faults and not hub.repos


def test_dry_run_gives_the_whole_command(folder, capsys):
    assert main(['push', 'model', REPO, '--private', '--revision', 'dev/x', '--message', 'a b']) == 0
    captured = capsys.readouterr()
    assert f'repository         {REPO} (private)\nrevision           dev/x\n' in captured.out
    assert captured.err.endswith(f"timm-itpn push model {REPO} --private --revision dev/x --message 'a b' --yes\n")


@pytest.mark.parametrize('name', FAMILIES)
def test_published_model_is_the_same(name, hub, token, tmp_path, capsys):
    model = small_model(name)
    folder = write(model, tmp_path / 'model')
    (folder / 'notes.txt').write_text('mine')
    (folder / 'logs').mkdir()
    assert main(['push', str(folder), REPO, '--yes']) == 0
    captured = capsys.readouterr()
    assert captured.out == f'{hub.endpoint}/{REPO}\n'
    assert 'left behind: logs, notes.txt\n' in captured.err
    assert captured.err.endswith(f"load it with: timm.create_model('hf-hub:{REPO}', pretrained=True)\n")
    assert sorted(hub.uploads) == [(REPO, file) for file in push.FILES]
    assert {key: value for key, value in hub.files(REPO).items() if key != '.gitattributes'} == {
        file: (folder / file).read_bytes() for file in push.FILES}
    assert [commit.message for commit in hub.repos[REPO].commits.values()] == [
        '', f'Upload {name} with timm-itpn {__version__}']
    published = timm.create_model(f'hf-hub:{REPO}', pretrained=True, cache_dir=tmp_path / 'cache')
    assert torch.equal(logits(published), logits(model))

    changed = small_model(name, seed=1)
    write(changed, folder)
    assert main(['push', str(folder), REPO, '--yes']) == 0
    published = timm.create_model(f'hf-hub:{REPO}', pretrained=True, cache_dir=tmp_path / 'cache')
    assert torch.equal(logits(published), logits(changed))
    assert not torch.equal(logits(changed), logits(model)) and num_commits(hub) == 2


def test_same_folder_again_makes_no_commit(hub, token, folder, capsys):
    for _ in range(2):
        assert main(['push', 'model', REPO, '--yes']) == 0
        assert capsys.readouterr().out == f'{hub.endpoint}/{REPO}\n'
    assert num_commits(hub) == 1


def test_private_branch_and_message_reach_the_hub(hub, token, folder, tmp_path, capsys):
    argv = ['push', 'model', REPO, '--yes', '--private', '--revision', 'dev', '--message', 'first try']
    for _ in range(2):
        assert main(argv) == 0
    assert f"'hf-hub:{REPO}@dev'" in capsys.readouterr().err
    repo = hub.repos[REPO]
    assert repo.private and list(hub.files(REPO)) == ['.gitattributes']
    assert repo.commits[repo.branches['dev']].message == 'first try'
    published = timm.create_model(f'hf-hub:{REPO}@dev', pretrained=True, cache_dir=tmp_path / 'cache')
    assert torch.equal(logits(published), logits(small_model('fast_itpn_tiny')))


def test_private_weights_never_go_to_a_public_repository(hub, token, folder, capsys):
    hub.commit(REPO, {})
    assert main(['push', 'model', REPO, '--yes', '--private']) == 1
    assert f'{REPO} is public: name another repository, or make it private at {hub.endpoint}' in error(capsys)
    assert not hub.uploads and not hub.objects


@pytest.mark.parametrize(('front', 'unknown'), [
    ('---\nlicense: unknown\n---\n', True),
    ('---\nlicense: "unknown"  # ask\n---\n', True),
    ('---\nlicense:\ntags: []\n---\n', True),
    ('---\ntags: []\n---\nlicense: mit\n', True),
    ('license: mit\n', True),
    ('---\ntags: []\nlicense: mit\n---\n', False),
])
def test_unknown_licence_is_warned_of(front, unknown, folder, capsys):
    (folder / 'README.md').write_text(front)
    assert main(['push', 'model', REPO]) == 0
    assert ('the licence of the weights is unknown: publish them only if' in capsys.readouterr().err) == unknown


# what is refused before anything is sent

WRITE = 'write it with: timm-itpn convert FILE --model NAME -o model'


def refuse(argv, capsys):
    """Run a command for real and dry, and return its sentence, the same for both."""
    assert main(['push', *argv, '--yes']) == 1
    sentence = error(capsys)
    assert main(['push', *argv]) == 1 and error(capsys) == sentence
    return sentence


@pytest.mark.parametrize('repo', ['model', 'a/b/c', '/model', 'a/', 'a b/c', 'a/b--c', 'a/-b', 'a/b.git', 'ä/b'])
def test_wrong_repository_names_are_refused(repo, hub, token, folder, capsys):
    sentence = refuse(['model', repo], capsys)
    assert repo in sentence and sentence.endswith('name it like this: timm-itpn push DIR OWNER/NAME')
    assert not hub.repos


def put(name, content):
    """A change of the folder: this file has this content."""
    return lambda path: (path / name).write_bytes(content)


@pytest.mark.parametrize(('change', 'message'), [
    (lambda path: shutil.rmtree(path), ' does not exist'),
    (lambda path: (shutil.rmtree(path), path.write_text('x')), ' is no folder'),
    (lambda path: (path / 'README.md').unlink(), ' has no README.md'),
    (lambda path: [(path / name).unlink() for name in push.FILES[1:]], ' has no config.json and no model.safetensors'),
    (put('README.md', b'\xff'), '/README.md is no text in UTF-8'),
    (put('config.json', b'{'), '/config.json is no JSON'),
    (put('config.json', b'\xff'), '/config.json is no JSON'),
    (put('config.json', b'[]'), '/config.json names no architecture'),
    (put('config.json', b'{"architecture": 3}'), '/config.json names no architecture'),
    (put('config.json', b'{"architecture": "resnet18"}'),
     "/config.json names a model of others (there is no model 'resnet18'; there are: fast_itpn_base"),
    (lambda path: os.truncate(path / 'model.safetensors', 99_999), '/model.safetensors is truncated or no safetensors'),
    (put('model.safetensors', b''), '/model.safetensors is truncated or no safetensors file'),
    (lambda path: torch.save({}, path / 'model.safetensors'), '/model.safetensors is truncated or no safetensors file'),
    (put('model.safetensors', b'\2' + bytes(7) + b'{}'), '/model.safetensors holds no tensors'),
])
def test_bad_folders_are_refused(change, message, hub, token, folder, capsys):
    change(folder)
    sentence = refuse(['model', REPO], capsys)
    assert sentence.startswith(f'timm-itpn: model{message}') and sentence.endswith(WRITE)
    assert not hub.repos


def test_token_is_no_argument(folder):
    with pytest.raises(SystemExit) as stop:
        main(['push', 'model', REPO, '--token', TOKEN])
    assert stop.value.code == 2


# what goes wrong on the way

def test_missing_token_is_said(hub, folder, capsys):
    assert main(['push', 'model', REPO, '--yes']) == 1
    assert error(capsys) == 'timm-itpn: no token: hf auth login, or set HF_TOKEN'
    assert not hub.repos


def test_wrong_token_is_said(hub, folder, monkeypatch, capsys):
    monkeypatch.setenv('HF_TOKEN', 'hf_wrong')
    for exists in (False, True):
        if exists:
            hub.commit(REPO, {})
        assert main(['push', 'model', REPO, '--yes']) == 1
        assert f'you are not allowed to write to {REPO} (HTTP 401: Invalid username' in error(capsys)
    assert not hub.uploads


@pytest.mark.parametrize('path', ['/api/repos/create', '/preupload/', '/objects/batch', '/commit/'])
def test_token_without_the_right_is_said(path, hub, token, folder, capsys):
    hub.faults.append(Fault(method='POST', path=path, status=403))
    assert main(['push', 'model', REPO, '--yes']) == 1
    assert f'you are not allowed to write to {REPO} (HTTP 403): hf auth login, or set HF_TOKEN' in error(capsys)
    assert num_commits(hub) == 0


@pytest.mark.parametrize('path', ['/api/repos/create', '/preupload/', '/objects/batch', '/lfs/', '/verify', '/commit/'])
def test_failure_leaves_no_commit_and_a_second_call_goes_on(path, hub, token, folder, monkeypatch, capsys):
    monkeypatch.setattr('time.sleep', lambda seconds: None)  # between the client's tries
    hub.faults += [Fault(method='PUT' if path == '/lfs/' else 'POST', path=path, status=500)] * 10
    assert main(['push', 'model', REPO, '--yes']) == 1
    assert f'the Hub did not take the upload to {REPO} (HTTP 500): run it again later' in error(capsys)
    assert num_commits(hub) == 0 and len(hub.faults) < 10
    hub.faults.clear()
    assert main(['push', 'model', REPO, '--yes']) == 0
    assert num_commits(hub) == 1


def test_answer_that_got_lost_is_found_out_by_a_second_call(hub, token, folder, capsys):
    hub.faults.append(Fault(method='POST', path='/commit/', cut_after=0))
    assert main(['push', 'model', REPO, '--yes']) == 1
    assert f'the Hub at {hub.endpoint} cannot be reached' in error(capsys)
    assert main(['push', 'model', REPO, '--yes']) == 0
    assert num_commits(hub) == 1


def test_card_that_the_hub_refuses_is_said(hub, token, folder, capsys):
    reason = b'{"errors": [{"message": "license: no such licence"}]}'
    hub.faults.append(Fault(method='POST', path='/api/validate-yaml', status=400, body=reason))
    assert main(['push', 'model', REPO, '--yes']) == 1
    assert error(capsys).endswith(
        f'the upload to {REPO} failed: Invalid metadata in README.md. - license: no such licence')
    assert num_commits(hub) == 0 and not hub.objects


def test_page_in_place_of_an_answer_is_one_sentence(hub, token, folder, capsys):
    hub.faults.append(Fault(method='POST', body=b'<html>log in to the hotel'))
    assert main(['push', 'model', REPO, '--yes']) == 1
    assert f'the upload to {REPO} failed: ' in error(capsys) and num_commits(hub) == 0


def test_hub_out_of_reach_is_said(token, folder, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, 'HfApi', partial(huggingface_hub.HfApi, endpoint='http://127.0.0.1:1'))
    assert main(['push', 'model', REPO, '--yes']) == 1
    assert f'the Hub at {huggingface_hub.constants.ENDPOINT} cannot be reached (' in error(capsys)


def test_offline_mode_is_said(hub, token, folder, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    assert main(['push', 'model', REPO]) == 0
    capsys.readouterr()
    assert main(['push', 'model', REPO, '--yes']) == 1
    assert 'HF_HUB_OFFLINE=1 forbids to upload: unset it, and run it again' in error(capsys)
    assert not hub.repos


def test_interruption_leaves_no_commit(hub, token, folder, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr('huggingface_hub._commit_api.lfs_upload', interrupted)
    assert main(['push', 'model', REPO, '--yes']) == 130
    assert capsys.readouterr().out == '' and num_commits(hub) == 0


def test_errors_of_code_are_not_hidden():
    with pytest.raises(KeyError):
        with push.readable_errors(REPO):
            raise KeyError('name')
    with pytest.raises(RuntimeError, match=f'the upload to {REPO} failed: a b'):
        with push.readable_errors(REPO):
            raise ValueError('a\nb')
