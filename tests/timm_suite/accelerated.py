"""Models with token gathering and migration, registered for timm's own test suite only (run_timm_suite.sh -m accelerated)."""
from timm.models import generate_default_cfgs, register_model
from timm_itpn.models.fast_itpn import _cfg, _create_fast_itpn
from timm_itpn.models.itpn import _create_itpn

default_cfgs = generate_default_cfgs({name: _cfg('', num_classes=1000) for name in (
    'accelerated_fast_itpn_light', 'accelerated_fast_itpn_full', 'accelerated_itpn_full', 'accelerated_fast_itpn_fpn')})
DEPTHS = dict(embed_dim=384, depths=(1, 1, 4), num_heads=6)


@register_model
def accelerated_fast_itpn_light(pretrained=False, **kwargs):
    model_args = dict(DEPTHS, acceleration='light', gather_window=3)
    return _create_fast_itpn('accelerated_fast_itpn_light', pretrained, **dict(model_args, **kwargs))


@register_model
def accelerated_fast_itpn_full(pretrained=False, **kwargs):
    model_args = dict(DEPTHS, acceleration='full', gather_window=7)
    return _create_fast_itpn('accelerated_fast_itpn_full', pretrained, **dict(model_args, **kwargs))


@register_model
def accelerated_itpn_full(pretrained=False, **kwargs):
    model_args = dict(DEPTHS, acceleration='full', gather_window=3)
    return _create_itpn('accelerated_itpn_full', pretrained, **dict(model_args, **kwargs))


@register_model
def accelerated_fast_itpn_fpn(pretrained=False, **kwargs):
    model_args = dict(DEPTHS, acceleration='full', gather_window=3, pyramid=kwargs.get('features_only', False))
    return _create_fast_itpn('accelerated_fast_itpn_fpn', pretrained, **dict(model_args, **kwargs))
