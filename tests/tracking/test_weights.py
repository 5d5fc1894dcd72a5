"""Weights of trackers, from the authors' code and back to it."""
import json
import re

import pytest
import timm
import torch
from support.small import images, small_model

from timm_itpn.cli import main
from timm_itpn.tools.convert import convert, revert
from timm_itpn.tracking import JointEncoder
from timm_itpn.tracking.embeddings import role_pos_embed
from timm_itpn.weights.layout import native_to_official

ROLES = dict(search=64, template=32)
TINY = dict(embed_dim=384, depths=(1, 1, 12), num_heads=6, num_classes=0)  # a registered size, 4 x 4 tokens
OWN = ('cls_token', 'search_token')
pytestmark = pytest.mark.usefixtures('one_thread')


class Settings:
    """Pickled in the authors' files, and not importable where those are read."""


def tracker_weights(name='fast_itpn_tiny', **kwargs):
    """A tracker's encoder in the authors' layout: 16 + 4 positions, and what is its own."""
    torch.manual_seed(0)
    weights = native_to_official(small_model(name, **{**TINY, **kwargs}).state_dict())
    key = next(key for key in weights if key.endswith('pos_embed'))
    dim = weights[key].shape[-1]
    weights[key] = torch.randn(1, 20, dim)
    return {**weights, **{key: torch.randn(1, 1, dim) for key in OWN}}


def save(weights, path, prefix='encoder.body.'):
    others = {'text_encoder.clip.visual.proj': torch.zeros(3), 'decoder.conv1_ctr.0.weight': torch.zeros(2)}
    net = {**{prefix + key: value for key, value in weights.items()}, **others}
    torch.save({'epoch': 180, 'net_type': 'SUTRACK', 'net': net, 'settings': Settings(), 'optimizer': {}}, path)


@pytest.fixture(scope='module')
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp('tracker') / 'w.pt'
    save(tracker_weights(), path)
    return path


def small_encoder(**kwargs):
    small = dict(embed_dim=64, depths=(1, 1, 1), num_heads=2, num_classes=0, **kwargs)
    return JointEncoder(small_model('fast_itpn_tiny', **small), ROLES, 'crop')


def test_tracker_file_converts_loads_and_goes_back_to_the_bit(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = {key: value.half() for key, value in tracker_weights(in_chans=6).items()}
    save(weights, 'tracker.pth.tar')
    roles = ['--role', 'search=64', '--role', 'template=32']
    assert main(['inspect', 'tracker.pth.tar', *roles, '--json']) == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    assert facts['model'] == 'fast_itpn_tiny' and facts['models'][0]['args'] == dict(img_size=[64, 64], in_chans=6)
    assert facts['parts']["tracker's own"] == 2 * 384 + 20 * 384
    assert ' '.join(roles) in captured.err
    report = convert(tmp_path / 'tracker.pth.tar', tmp_path / 'folder', roles=dict(search=(64, 64), template=(32, 32)),
                     verify=True)
    assert report['source']['wrapper'] == 'net.encoder.body' and report['model'] == 'fast_itpn_tiny'
    revert(tmp_path / 'folder', tmp_path / 'back.pt', verify=True)
    back = torch.load('back.pt')['model']
    assert set(back) == set(weights) and all(torch.equal(back[key], value) for key, value in weights.items())

    model = timm.create_model('local-dir:folder', pretrained=True)
    assert model.in_chans == 6 and torch.equal(model.stages[2].pos_embed, weights['pos_embed'][:, :16].float())
    encoder = JointEncoder(model, ROLES)
    for path in ('folder', 'tracker.pth.tar'):
        encoder.norm.reset_parameters()
        own = encoder.load(path)
        assert set(own) == set(OWN) and all(torch.equal(own[key], weights[key]) for key in OWN)
        assert torch.equal(torch.cat(list(encoder.pos_embed.values()), dim=1), weights['pos_embed'].float())
        official = encoder.official_state_dict()
        assert set(official) == set(weights) - set(OWN)
        assert all(torch.equal(value, weights[key].float()) for key, value in official.items())


@pytest.mark.parametrize(('roles', 'message'), [
    ([], r'not of an official Fast-iTPN: cls_token, search_token\. Those of a tracker are read with --role'),
    (['search=64'], '20 tokens, but 64 x 64 pixels are 4 x 4: correct --img-size or --role'),
    (['search'], '--role search has no size: give it as search=224'),
    (['search=64', 'template=x'], 'size x is not usable: give a side such as 224'),
])
def test_roles_that_cannot_be_are_one_sentence(roles, message, file, tmp_path, capsys):
    options = [part for role in roles for part in ('--role', role)]
    assert main(['convert', str(file), *options, '-o', str(tmp_path / 'out')]) == 1
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and re.search(message, error)


@pytest.mark.parametrize('norm', ['fc_norm', 'norm', 'norm_'])
def test_encoder_in_a_tracker_takes_the_layout_of_the_authors(norm):
    class Body(JointEncoder):
        def __init__(self, *args):
            super().__init__(*args)
            for key in OWN:
                self.register_parameter(key, torch.nn.Parameter(torch.zeros(1, 1, 64)))

    small = dict(embed_dim=64, depths=(1, 1, 1), num_heads=2, num_classes=0)
    weights = tracker_weights(**small)
    for leaf in ('weight', 'bias'):
        weights[f'{norm}.{leaf}'] = weights.pop(f'fc_norm.{leaf}') + 1.
    body = Body(small_model('fast_itpn_tiny', **small), ROLES)
    tracker = torch.nn.ModuleDict(dict(body=body, head=torch.nn.Linear(2, 2)))
    head = {f'head.{key}': value for key, value in tracker['head'].state_dict().items()}
    tracker.load_state_dict({**{f'body.{key}': value for key, value in weights.items()}, **head})
    tracker.load_state_dict(tracker.state_dict())  # its own layout too
    assert torch.equal(body.cls_token, weights['cls_token'])
    assert torch.equal(body.pos_embed['template'], weights['pos_embed'][:, 16:])
    assert torch.equal(body.norm.bias, weights[f'{norm}.bias'])
    official = body.official_state_dict()
    assert torch.equal(official['cls_token'], weights['cls_token']) and len(official) == len(weights)
    with pytest.raises(RuntimeError, match='Unexpected key.* "body.surplus"'):
        tracker.load_state_dict({**tracker.state_dict(), 'body.surplus': torch.zeros(1)})


def test_weights_of_one_grid_give_positions_to_all_roles():
    encoder, other = small_encoder(), small_model('fast_itpn_tiny', embed_dim=64, depths=(1, 1, 1), num_heads=2, seed=1)
    encoder.load_state_dict(native_to_official(other.state_dict()), strict=False)
    assert torch.equal(encoder.pos_embed['search'], other.stages[2].pos_embed)
    expected = role_pos_embed(other.stages[2].pos_embed, (2, 2), (4, 4), 'crop')
    assert torch.equal(encoder.pos_embed['template'], expected)
    with pytest.raises(ValueError, match='has 17 tokens, which is no square, and the roles have others'):
        encoder.load_state_dict({**native_to_official(other.state_dict()), 'pos_embed': torch.zeros(1, 17, 64)})


@pytest.mark.parametrize(('change', 'message'), [
    (lambda w: w.pop('fc_norm.bias'), r'it lacks norm.bias\. It has besides: cls_token, search_token\.'),
    (lambda w: w.update({'fc_norm.bias': torch.full((64,), torch.nan)}), 'norm.bias has values that are infinite'),
])
def test_file_that_is_incomplete_or_broken_is_refused(change, message, tmp_path):
    weights = tracker_weights(embed_dim=64, depths=(1, 1, 1), num_heads=2)
    change(weights)
    save(weights, tmp_path / 'w.pt')
    with pytest.raises(ValueError, match=message):
        small_encoder().load(tmp_path / 'w.pt')


def test_stem_of_six_channels_has_half_of_the_kernels_twice(tmp_path):
    small = dict(embed_dim=64, depths=(1, 1, 1), num_heads=2, num_classes=0)
    three = small_model('fast_itpn_tiny', **small)
    torch.save(native_to_official(three.state_dict()), tmp_path / 'w.pt')
    overlay = dict(file=str(tmp_path / 'w.pt'))
    six = small_model('fast_itpn_tiny', in_chans=6, pretrained=True, pretrained_cfg_overlay=overlay, **small)
    kernel = three.patch_embed.proj.weight
    assert torch.equal(six.patch_embed.proj.weight, torch.cat((kernel / 2, kernel / 2), dim=1))
    x = images(2, 3, 64, 64)
    torch.testing.assert_close(six(torch.cat((x, x), dim=1)), three(x))
