"""The feature pyramid as a timm backbone: values, levels, sizes, and files with and without one."""
import pytest
import timm
import torch
import torch.nn.functional as F
from support import golden
from support.small import PYRAMIDS, images, official_weights, small_model
from timm.layers import set_fused_attn

GOLDENS = {  # golden: model, arguments, key, bound
    'fast_itpn_tiny_mim': ('fast_itpn_tiny_fpn', {}, 'pyramid_clean', 2e-7),
    'fast_itpn_base_mim': ('fast_itpn_base_fpn', {}, 'pyramid_clean', 2e-7),
    'itpn_base_pyramid': ('itpn_base_fpn', dict(pyramid_depth=1), 'pyramid', 5e-6),
}
STRIDES = [4, 8, 16, 32, 64]

every_pyramid = pytest.mark.parametrize('name', PYRAMIDS)


def backbone(name, **kwargs):
    return small_model(name, features_only=True, **kwargs)


def load(name, path, **kwargs):
    overlay = dict(file=str(path), num_classes=0)
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


def official_file(name, path, dtype=torch.float32, **changed):
    return save({**golden.official_state_dict(golden.load(name), dtype), **changed}, path)


def save(state_dict, path):
    torch.save({'model': state_dict}, path)
    return path


# values

def assert_golden(model, name, dtype, bound):
    expected, key = golden.load(name), GOLDENS[name][2]
    with torch.inference_mode():
        features = model.to(dtype)(golden.image(expected, dtype))
    for feature, stride in zip(features, (4, 8, 16)):
        assert golden.error(feature, expected[key][f'stride{stride}']) < bound


@pytest.mark.parametrize('name', [
    'fast_itpn_tiny_mim', 'itpn_base_pyramid', pytest.param('fast_itpn_base_mim', marks=pytest.mark.slow)])
def test_golden_values_hold(name):
    model_name, kwargs, _, bound = GOLDENS[name]
    model = timm.create_model(model_name, features_only=True, device='meta', **kwargs).eval()
    official = golden.official_state_dict(golden.load(name))
    model.load_state_dict({f'model.{key}': value for key, value in official.items()}, strict=False, assign=True)
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert_golden(model, name, torch.float64, bound)


def test_golden_values_hold_through_an_official_file_and_plain_attention(tmp_path):
    name = 'fast_itpn_tiny_mim'
    path = official_file(name, tmp_path / 'official.pt')
    set_fused_attn(False)
    try:
        model = load(GOLDENS[name][0], path, features_only=True)
    finally:
        set_fused_attn(True)
    assert_golden(model, name, torch.float32, 1e-4)


def test_parameter_count_is_that_of_the_official_model():
    """itpn_base_pyramid has no head; the plain models are counted elsewhere."""
    model = timm.create_model('itpn_base_fpn', pyramid=True, pyramid_depth=1, num_classes=0, device='meta')
    norm = sum(p.numel() for p in model.head.parameters())
    assert sum(p.numel() for p in model.parameters()) - norm == golden.load('itpn_base_pyramid')['params']


def test_pyramid_does_not_mix_positions():
    """Levels depend on stage 3 and on their own patch only: exchanging two patches of the stages exchanges them."""
    pyramid = small_model('fast_itpn_tiny_fpn', pyramid=True).pyramid
    stages = [torch.randn(1, 16 // 2 ** i, 16 // 2 ** i, 32 * 2 ** i) for i in range(3)]
    rolled = [stage.roll((4 // 2 ** i, 8 // 2 ** i), dims=(1, 2)) for i, stage in enumerate(stages)]
    with torch.inference_mode():
        for i, (a, b) in enumerate(zip(pyramid(stages, [0, 1, 2]), pyramid(rolled, [0, 1, 2]))):
            torch.testing.assert_close(a.roll((4 // 2 ** i, 8 // 2 ** i), dims=(1, 2)), b)


# levels

@every_pyramid
def test_features_are_five_levels(name):
    model = backbone(name, img_size=(64, 96))
    assert model.feature_info.reduction() == STRIDES and model.feature_info.channels() == [256] * 5
    with torch.inference_mode():
        features = model(images(2, 3, 64, 96))
    assert [tuple(f.shape[2:]) for f in features] == [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
    assert all(f.shape[:2] == (2, 256) and f.is_contiguous() for f in features)


@pytest.mark.parametrize('out_indices', [(0,), (1,), (2,), (4,), (0, 3), (1, 2), (-1,), (2, 3, 4), 2])
@every_pyramid
def test_any_levels_are_the_same_alone_and_leave_no_unused_parameter(name, out_indices):
    x = images(2, 3, 64, 64)
    whole = small_model(name, pyramid=True)
    model = backbone(name, out_indices=out_indices)
    model.model.load_state_dict({k: v for k, v in whole.state_dict().items() if k in model.model.state_dict()})
    numbers = list(range(5))[-out_indices:] if isinstance(out_indices, int) else sorted(i % 5 for i in out_indices)
    with torch.inference_mode():
        expected = whole.forward_intermediates(x, intermediates_only=True)
        alone = whole.forward_intermediates(x, indices=out_indices, intermediates_only=True)
    features = model(x)
    assert len(features) == len(alone) == len(numbers)
    for number, a, b in zip(numbers, features, alone):
        torch.testing.assert_close(a, expected[number])
        torch.testing.assert_close(b, expected[number])
    assert model.feature_info.reduction() == [STRIDES[i] for i in numbers]
    sum(f.sum() for f in features).backward()
    assert not [key for key, p in model.named_parameters() if p.grad is None]


def test_levels_not_asked_for_are_not_computed():
    model = small_model('fast_itpn_tiny_fpn', pyramid=True)
    calls = []
    for i, level in enumerate(model.pyramid.levels):
        level.register_forward_hook(lambda *args, i=i: calls.append(i))
    for indices, computed in (([4], [2]), ([1], [1]), ([0], [1, 0]), ([1, 2], [2, 1])):
        calls.clear()
        model.forward_intermediates(images(1, 3, 64, 64), indices=indices)
        assert calls == computed


@pytest.mark.parametrize('pool', ['max', 'avg', 'subsample'])
def test_coarse_levels_are_pooled_as_asked(pool):
    model = backbone('fast_itpn_tiny_fpn', img_size=(80, 96), pyramid_pool=pool)
    with torch.inference_mode():
        _, _, p16, p32, p64 = model(images(1, 3, 80, 96))
    assert p16.shape[2:] == (5, 6)
    padded = F.pad(p16, (0, 0, 0, 1), value=float('nan'))  # an odd side: the last window has one row only
    windows = padded.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
    expected = dict(max=windows.nan_to_num(-1e9).amax(-1), avg=windows.nanmean(-1), subsample=windows[..., 0])
    torch.testing.assert_close(p32, expected[pool])
    assert p64.shape[2:] == (2, 2)


@pytest.mark.parametrize('name', ['fast_itpn_base_fpn', 'itpn_base_fpn'])
def test_concatenation_has_the_channels_of_the_segmentation_recipe(name):
    model = timm.create_model(name, features_only=True, pyramid_concat=True, device='meta')
    assert model.feature_info.channels() == [384, 512, 768, 768, 768]


@every_pyramid
def test_concatenation_is_level_then_stage(name):
    x = images(2, 3, 64, 64)
    joined = backbone(name, pyramid_concat=True)
    model = backbone(name)
    model.load_state_dict(joined.state_dict())
    plain = small_model(name.removesuffix('_fpn'), features_only=True)
    plain.load_state_dict({k: v for k, v in joined.state_dict().items() if 'pyramid' not in k})
    with torch.inference_mode():
        levels, stages = model(x), plain(x)
        for feature, stage, level in zip(joined(x), stages, levels):
            torch.testing.assert_close(feature, torch.cat((level, stage), dim=1))


@every_pyramid
def test_any_size_works(name):
    model = backbone(name, dynamic_img_size=True)
    for height, width in ((160, 336), (16, 16), (48, 208)):
        with torch.inference_mode():
            features = model(images(1, 3, height, width))
        for feature, stride in zip(features, STRIDES):
            grid = (-(-height // stride), -(-width // stride)) if stride > 16 else (height // stride, width // stride)
            assert feature.shape == (1, 256, *grid) and feature.isfinite().all()


@every_pyramid
def test_resizing_matches_dynamic_size(name):
    dynamic = backbone(name, dynamic_img_size=True)
    resized = backbone(name)
    resized.load_state_dict(dynamic.state_dict())
    resized.model.set_input_size((48, 112))
    x = images(1, 3, 48, 112)
    with torch.inference_mode():
        for a, b in zip(resized(x), dynamic(x)):
            torch.testing.assert_close(a, b)


# as a classifier

@every_pyramid
def test_classifier_is_the_plain_model(name):
    model, plain = small_model(name), small_model(name.removesuffix('_fpn'))
    assert set(model.state_dict()) == set(plain.state_dict())
    x = images(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(model(x), plain(x))
    both = small_model(name, pyramid=True)
    both.load_state_dict(plain.state_dict(), strict=False)  # all but the pyramid
    with torch.inference_mode():
        torch.testing.assert_close(both(x), plain(x))


@every_pyramid
def test_checkpointed_gradients_agree(name):
    model = backbone(name).train()
    x = images(2, 3, 64, 64)
    gradients = []
    for enable in (False, True):
        model.zero_grad()
        model.model.set_grad_checkpointing(enable)
        assert all(level.grad_checkpointing is enable for level in model.model.pyramid.levels)
        sum(f.sum() for f in model(x)).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


# files

@pytest.mark.parametrize('golden_name, name', [
    ('fast_itpn_tiny_mim', 'fast_itpn_tiny_fpn'),
    ('itpn_base_mae', 'itpn_base_fpn.pixel_in1k'),  # two blocks per level
])
def test_pretraining_file_fills_the_pyramid(golden_name, name, tmp_path, caplog):
    with caplog.at_level('INFO'):
        model = load(name, official_file(golden_name, tmp_path / 'w.pt'), features_only=True).model
    official = golden.official_state_dict(golden.load(golden_name), torch.float32)
    pyramid = dict(model.pyramid.named_parameters())
    sizes = {key: value for key, value in official.items()
             if key.startswith(('align_dim', 'fpn_modules', 'split_', 'block_'))}
    if name.startswith('fast'):
        sizes.update({key: official[key] for key in ('norm.weight', 'norm.bias')})
    assert len(pyramid) == len(sizes)
    assert sum(p.sum() for p in pyramid.values()).item() == pytest.approx(
        sum(value.sum() for value in sizes.values()).item(), abs=1e-2)
    for level, block in ((0, 'block_8to4'), (1, 'block_16to8')):
        last = len(model.pyramid.levels[level].blocks) - 1
        actual = model.pyramid.levels[level].blocks[last].mlp.fc1.weight
        torch.testing.assert_close(actual, official[f'{block}.{last}.mlp.fc1.weight'].flatten(1))
    assert 'only pre-training needs' in caplog.text and 'pyramid' not in caplog.text


def test_file_without_pyramid_is_refused_unless_asked_for(tmp_path, caplog, small_models):
    official = official_weights(num_classes=1000)
    path = save(official, tmp_path / 'w.pt')
    with pytest.raises(ValueError, match="no feature pyramid: use a pre-training file, or pass pyramid_init='random'"):
        load('fast_itpn_tiny_fpn', path, features_only=True)
    with caplog.at_level('INFO'):
        model = load('fast_itpn_tiny_fpn', path, features_only=True, pyramid_init='random').model
    assert 'it starts new, as asked for by pyramid_init' in caplog.text
    torch.testing.assert_close(model.stages[2].blocks[1].ls1.gamma, official['blocks.6.gamma_1'])
    assert (model.pyramid.norm.weight == 1).all()


def test_pyramid_of_another_size_is_refused_with_its_sizes(tmp_path):
    path = official_file('fast_itpn_tiny_mim', tmp_path / 'w.pt')
    with pytest.raises(ValueError, match='has dim 256, depth 1, hidden width 682, but .* dim 256, depth 2, hidden'):
        load('fast_itpn_tiny_fpn', path, features_only=True, pyramid_depth=2)
    wide = {f'fpn_modules.{i}.mlp.{leaf}': torch.zeros(shape) for i in range(3) for leaf, shape in (
        ('fc1.weight', (768, 256, 1, 1)), ('fc1.bias', (768,)), ('fc2.weight', (256, 768, 1, 1)))}
    path = official_file('fast_itpn_tiny_mim', tmp_path / 'w.pt', **wide)
    with pytest.raises(ValueError, match='hidden width 768, but the model.s has dim 256, depth 1, hidden width 682'):
        load('fast_itpn_tiny_fpn', path, features_only=True)


def test_incomplete_pyramid_is_refused_with_the_missing_keys(tmp_path, small_models):
    weights = official_weights(num_classes=0, pyramid=True)
    del weights['align_dim_8to4.bias']
    path = save(weights, tmp_path / 'w.pt')
    with pytest.raises(ValueError, match=r'it lacks pyramid\.levels\.0\.align\.bias'):
        load('fast_itpn_tiny_fpn', path, features_only=True)


def test_pyramid_is_left_out_of_a_classifier_and_the_log_says_so(tmp_path, caplog, small_models):
    path = save(official_weights(num_classes=0, pyramid=True), tmp_path / 'w.pt')
    for name in ('fast_itpn_tiny', 'fast_itpn_tiny_fpn'):
        caplog.clear()
        with caplog.at_level('INFO'):
            load(name, path, num_classes=3)
        assert 'Left out the feature pyramid' in caplog.text


# bad input

def test_other_feature_classes_are_refused():
    for feature_cls in ('hook', 'list', 'fx'):
        with pytest.raises(ValueError, match=f"feature_cls '{feature_cls}' cannot see the pyramid"):
            backbone('fast_itpn_tiny_fpn', feature_cls=feature_cls)


@every_pyramid
def test_unknown_choices_are_refused(name):
    with pytest.raises(ValueError, match="pyramid_pool 'median' is unknown"):
        backbone(name, pyramid_pool='median')
    with pytest.raises(ValueError, match="pyramid_init 'zero' is unknown"):
        backbone(name, pyramid_init='zero')
