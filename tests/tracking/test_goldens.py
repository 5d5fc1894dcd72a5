"""What the encoders of five trackers compute, through weights in the authors' layout."""
import pytest
import timm
import torch
from support import golden

from timm_itpn.tracking import JointEncoder, foreground_share

ARCHS = {
    'sutrack_tiny_rgb_224': ('fast_itpn_tiny', 'crop'),
    'sutrack_base_6ch_224': ('fast_itpn_base', 'crop'),
    'mcitrack_tiny_224': ('fast_itpn_tiny', 'crop'),
    'dutrack_base_256': ('fast_itpn_base', 'half_pixel'),
    'aqatrack_hivit_base_256': ('hivit_base', 'half_pixel'),
}
NORMS = {'dutrack_base_256': 'norm', 'aqatrack_hivit_base_256': 'norm_'}
pytestmark = pytest.mark.usefixtures('one_thread')


def encoder_of(name, tmp_path):
    """Encoder with the weights of a golden, what the tracker has besides, its images, and check()."""
    arch, positions = ARCHS[name]
    expected = golden.load(f'tracking/{name}')
    inputs = {key: torch.from_numpy(golden.noise(*value)) for key, value in expected['inputs'].items()}
    state_dict = {key: value for key, value in golden.official_state_dict(expected).items() if key[:5] != 'neck.'}
    roles = {key.partition('.')[0]: value.shape[-1] for key, value in inputs.items() if value.ndim == 4}
    create = dict(num_classes=0, in_chans=6 if name.startswith('sutrack') else 3, dtype=torch.float64)
    if arch == 'hivit_base':
        create['rel_pos_bias'] = False
    if name == 'sutrack_tiny_rgb_224':  # made of a pre-training file
        own = {key: state_dict.pop(key) for key in list(state_dict) if '_token' in key or key.startswith('fc_norm')}
        path = tmp_path / 'pretraining.pt'
        torch.save({'model': state_dict}, path)
        model = timm.create_model(arch, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **create)
        encoder = JointEncoder(model, roles, positions)
        encoder.norm.load_state_dict({leaf: own.pop(f'fc_norm.{leaf}') for leaf in ('weight', 'bias')})
    else:
        names = {'norm': NORMS.get(name, 'fc_norm')}
        encoder = JointEncoder(timm.create_model(arch, **create), roles, positions, names=names)
        own = {key: state_dict[key] for key in encoder.load_state_dict(state_dict, strict=False).unexpected_keys}
    bound = {'dutrack_base_256': 1e-6, 'aqatrack_hivit_base_256': 5e-6}.get(name, 2e-7)

    def check(key, found):
        if 'block' in key or 'range' in key:
            limit = 5e-7
        elif 'tokens' in key:
            limit = max(bound, 1e-6)
        else:
            limit = 5e-6 if 'attention' in key else bound
        assert golden.error(found, expected['outputs'][key]) < limit, key

    made = {f'pos_embed_{role}': position for role, position in encoder.pos_embed.items()}
    made.update(pos_embed=torch.cat(list(encoder.pos_embed.values()), dim=1), stem=encoder.patch_embed.proj.weight)
    for key in made.keys() & expected.keys():
        assert golden.error(made[key], expected[key]) < 1e-6, key  # of a standard deviation of 0.025: float32
    return encoder.eval(), own, inputs, expected, check


def soft_types(own, boxes):
    share = torch.stack([foreground_share(torch.tensor(box, dtype=torch.float64), 112, 112) for box in boxes], dim=1)
    foreground, background = own['template_foreground_token'], own['template_background_token']
    return dict(search=own['search_token'], template=torch.lerp(background, foreground, share[..., None]))


def templates(inputs):
    return torch.stack([x for key, x in inputs.items() if key.startswith('template')], dim=1)


@pytest.mark.parametrize('name', [
    'sutrack_tiny_rgb_224', pytest.param('sutrack_base_6ch_224', marks=pytest.mark.slow)])
@torch.no_grad()
def test_sutrack(name, tmp_path):
    encoder, own, inputs, expected, check = encoder_of(name, tmp_path)
    images = dict(search=inputs['search'], template=templates(inputs))
    if name == 'sutrack_tiny_rgb_224':  # the image twice
        images = {role: torch.cat((x, x), dim=-3) for role, x in images.items()}
    types = soft_types(own, list(expected['boxes'].values()))
    around = own['cls_token'], inputs.get('text')
    parts = {role: encoder.embed(x, role, types[role]) for role, x in images.items()}
    tokens = encoder.join(parts, *around)
    check('embedded', tokens)
    tokens = encoder.run(tokens, 0, 1)
    check('first_block', tokens)
    tokens = encoder.run(tokens, 1)
    check('last_block', tokens)
    whole, maps = encoder(images, *around, types)
    check('tokens', whole)
    check('search_map', maps['search'])
    torch.testing.assert_close(encoder.norm(tokens), whole, rtol=0, atol=1e-10)


@torch.no_grad()
def test_mcitrack(tmp_path):
    encoder, own, inputs, expected, check = encoder_of('mcitrack_tiny_224', tmp_path)
    types = soft_types(own, list(expected['boxes'].values()))
    kept = encoder.embed(templates(inputs), 'template', types['template'])
    for frame in (1, 0):
        tokens = encoder.join(dict(
            search=encoder.embed(inputs[f'search.{frame}'], 'search', types['search']), template=kept))
        check(f'frame{frame}.embedded', tokens)
    for i, (start, stop) in enumerate(expected['interaction_indexes']):  # in the list of all blocks: less the first
        tokens = encoder.run(tokens, start - 4, stop - 4)
        check(f'without_neck.after_range_{i}', tokens)
    check('without_neck.tokens', encoder.norm(tokens))


@pytest.mark.slow
@torch.no_grad()
def test_dutrack(tmp_path):
    encoder, own, inputs, expected, check = encoder_of('dutrack_base_256', tmp_path)
    temporal = own['temporal_token'] + golden.tensor('pos_embed', (1, 196, 512))[:, :1]
    kept = encoder.embed(templates(inputs), 'template')
    for frame in (0, 1):
        parts = dict(template=kept, search=encoder.embed(inputs[f'search.{frame}'], 'search'))
        before = torch.cat((temporal.expand(2, -1, -1), inputs['text']), dim=1)
        tokens = encoder.run(encoder.join(parts, before), 0, 23)
        check(f'frame{frame}.attention_last', encoder.attention(tokens, -1))
        tokens = encoder.norm(encoder.run(tokens, 23))
        check(f'frame{frame}.tokens', tokens)
        assert torch.equal(encoder.split(tokens, parts, before.shape[1])['search'].flatten(2).mT, tokens[:, -256:])
        temporal = tokens[:, :3]


@pytest.mark.slow
@torch.no_grad()
def test_aqatrack(tmp_path):
    encoder, _, inputs, expected, check = encoder_of('aqatrack_hivit_base_256', tmp_path)
    tokens, _ = encoder(dict(template=inputs['template.0'], search=inputs['search']))
    check('tokens', tokens)
