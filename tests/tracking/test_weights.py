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


def assert_same(found, weights):
    assert set(found) == set(weights)
    assert all(torch.equal(found[key], value) for key, value in weights.items())


def small_encoder(roles=ROLES):
    small = dict(embed_dim=64, depths=(1, 1, 1), num_heads=2, num_classes=0)
    return JointEncoder(small_model('fast_itpn_tiny', **small), roles, 'crop')


def test_tracker_file_converts_loads_and_goes_back_to_the_bit(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = {key: value.half() for key, value in tracker_weights(in_chans=6).items()}
    save(weights, 'tracker.pth.tar')
    roles = ['--role', 'search=64', '--role', 'template=32']
    assert main(['inspect', 'tracker.pth.tar', *roles, '--json']) == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    assert facts['model'] == 'fast_itpn_tiny' and facts['models'][0]['args'] == dict(img_size=[64, 64], in_chans=6)
    assert facts['parts']["tracker's own"] == (4 + 20) * 384  # tokens, norm and positions
    assert ' '.join(roles) in captured.err
    report = convert(tmp_path / 'tracker.pth.tar', tmp_path / 'folder', roles=dict(search=(64, 64), template=(32, 32)),
                     verify=True)
    assert report['source']['wrapper'] == 'net.encoder.body' and report['model'] == 'fast_itpn_tiny'
    revert(tmp_path / 'folder', tmp_path / 'back.pt', verify=True)
    back = torch.load('back.pt')['model']
    assert_same(back, weights)

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


DIM = 128
X, Z = 'pos_embed_x', 'pos_embed_z'
ELSEWHERE = {'pos_embed.search': X, 'pos_embed.template': Z}
# model, prefix in the file, names of the encoder's, shapes of what is the tracker's own
TRACKERS = dict(
    sutrack=('fast_itpn_tiny', 'encoder.body.', {}, dict(cls_token=(1, 1, DIM), search_token=(DIM,))),
    mcitrack=('fast_itpn_tiny', 'encoder.body.', {}, dict(template_foreground_token=(DIM,), positions=(1, 4, DIM))),
    relo=('fast_itpn_tiny', 'encoder.', {}, {
        'temporal_tokens': (1, 4, DIM), 'norm.weight': (DIM,), 'norm.bias': (DIM,)}),
    dutrack=('fast_itpn_tiny', 'backbone.', {'norm': 'norm', **ELSEWHERE}, {
        'pos_embed': (1, 9, DIM), 'temporal_token': (1, 1, DIM), 'mask_token': (1, 1, DIM)}),
    cstrack=('fast_itpn_tiny', 'backbone.', {'pos_embed.template': Z}, {
        'patch_embed_x.proj.weight': (32, 3, 4, 4), 'patch_embed.proj2.weight': (32, 3, 4, 4),
        'head.conv.weight': (2, DIM, 3, 3), 'head.weight': (7,), 'stages.weight': (1,)}),
    aqatrack=('hivit_tiny', 'backbone.', {'norm': 'norm_', **ELSEWHERE}, {
        'absolute_pos_embed': (1, 9, DIM), 'pos_embed': (1, 4, DIM), 'norm.weight': (DIM,), 'norm.bias': (DIM,)}),
)


@pytest.mark.parametrize('tracker', TRACKERS)
def test_files_of_trackers_convert_load_and_go_back_to_the_bit(tracker, small_models, tmp_path):
    arch, prefix, names, own = TRACKERS[tracker]
    options = dict(num_classes=0, **(dict(rel_pos_bias=False) if arch == 'hivit_tiny' else {}))
    weights = native_to_official(small_model(arch, **options).state_dict())
    own = {key: torch.randn(shape) for key, shape in own.items()}
    del weights[next(key for key in weights if key.endswith('pos_embed'))]
    for leaf in ('weight', 'bias'):
        weights[f'{names.get("norm", "fc_norm")}.{leaf}'] = weights.pop(f'fc_norm.{leaf}') + torch.randn(DIM)
    positions = {role: torch.randn(1, num, DIM) for role, num in dict(search=16, template=4).items()}
    for role, embedding in positions.items():
        key = names.get(f'pos_embed.{role}', 'pos_embed')
        weights[key] = torch.cat([weights[key], embedding], dim=1) if key in weights else embedding
    weights.update(own)
    save(weights, tmp_path / 'w.pt', prefix)

    side = 48 if X in weights else 64  # of the image that `pos_embed` starts with
    roles = {'search': (side, side), **({} if names else {'template': (32, 32)})}
    convert(tmp_path / 'w.pt', tmp_path / 'folder', arch, verify=True, roles=roles)
    revert(tmp_path / 'folder', tmp_path / 'back.pt', verify=True)
    assert_same(torch.load(tmp_path / 'back.pt')['model'], weights)
    model = timm.create_model(f'local-dir:{tmp_path / "folder"}', pretrained=True)
    assert model.patch_embed.img_size == (side, side)
    encoder = JointEncoder(model, ROLES, names=names)
    for path in ('w.pt', 'folder'):
        for parameter in encoder.parameters():
            torch.nn.init.zeros_(parameter)
        assert_same(encoder.load(tmp_path / path), own)
        assert_same(encoder.pos_embed, positions)
        assert_same({**encoder.official_state_dict(), **own}, weights)


def test_positions_are_taken_in_the_order_of_the_roles(caplog):
    weights = tracker_weights(embed_dim=64, depths=(1, 1, 1), num_heads=2)
    for roles in (ROLES, dict(template=32, search=64)):
        encoder = small_encoder(roles=roles)
        with caplog.at_level('INFO'):
            encoder.load_state_dict(weights, strict=False)  # they have tokens of the tracker's own
        assert f'Took the position embedding for that of {encoder.grid_sizes}, in this order.' in caplog.text
        assert torch.equal(torch.cat([encoder.pos_embed[role] for role in roles], dim=1), weights['pos_embed'])
        assert torch.equal(encoder.official_state_dict()['pos_embed'], weights['pos_embed'])


def test_checkpoint_of_a_model_that_contains_an_encoder_loads(tmp_path):
    encoder, other = small_encoder(), small_encoder(roles=dict(template=32, search=64))
    torch.nn.init.normal_(encoder.norm.weight)
    tracker = torch.nn.ModuleDict(dict(encoder=encoder, head=torch.nn.Linear(2, 2)))
    torch.save({'model': tracker.state_dict(), 'optimizer': {}}, tmp_path / 'mine.pth')
    assert other.load(tmp_path / 'mine.pth') == {}
    assert_same(other.state_dict(), encoder.state_dict())
    with pytest.raises(ValueError, match='it is of a tracking.JointEncoder, whose `load` reads it'):
        convert(tmp_path / 'mine.pth', tmp_path / 'out')


def test_name_that_the_file_lacks_is_refused(file):
    encoder = JointEncoder(small_model('fast_itpn_tiny', **TINY), ROLES, names={'pos_embed.template': 'pos_embed_y'})
    with pytest.raises(ValueError, match=r'20 tokens, which is no square, and .* {.search.: \(4, 4\)}'):
        encoder.load(file)
    encoder = JointEncoder(small_model('fast_itpn_tiny', **TINY), ROLES, names=ELSEWHERE)
    with pytest.raises(ValueError, match=r'lacks pos_embed.search, .*\. It has \(for names=\): pos_embed'):
        encoder.load(file)


def test_file_of_a_deeper_network_is_refused(tmp_path):
    save(tracker_weights(embed_dim=64, depths=(1, 1, 2), num_heads=2), tmp_path / 'w.pt')
    with pytest.raises(RuntimeError, match='Unexpected key.* "stages.2.blocks.1.ls1.gamma"'):
        small_encoder().load(tmp_path / 'w.pt')


@pytest.mark.parametrize(('roles', 'message'), [
    ([], r'not of an official Fast-iTPN: cls_token, search_token\. Those of a tracker are read with --role'),
    (['search=64'], '20 tokens, but 64 x 64 pixels are 4 x 4: correct --img-size or --role. A tracker .* search=224'),
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
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            for key in OWN:
                self.register_parameter(key, torch.nn.Parameter(torch.zeros(1, 1, 64)))

    small = dict(embed_dim=64, depths=(1, 1, 1), num_heads=2, num_classes=0)
    weights = tracker_weights(**small)
    for leaf in ('weight', 'bias'):
        weights[f'{norm}.{leaf}'] = weights.pop(f'fc_norm.{leaf}') + 1.
    body = Body(small_model('fast_itpn_tiny', **small), ROLES, names={'norm': norm})
    tracker = torch.nn.ModuleDict(dict(body=body, head=torch.nn.Linear(2, 2)))
    head = {f'head.{key}': value for key, value in tracker['head'].state_dict().items()}
    tracker.load_state_dict({**{f'body.{key}': value for key, value in weights.items()}, **head})
    tracker.load_state_dict(tracker.state_dict())  # its own layout too
    assert torch.equal(body.cls_token, weights['cls_token'])
    assert torch.equal(body.pos_embed['template'], weights['pos_embed'][:, 16:])
    assert torch.equal(body.norm.bias, weights[f'{norm}.bias'])
    assert_same(body.official_state_dict(), weights)
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
    (lambda w: w.pop('fc_norm.bias'), r'it lacks norm.bias\. It has \(for names=\): cls_token, search_token\.'),
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
