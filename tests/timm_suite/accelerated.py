"""Models with token gathering and migration, registered for timm's own test suite only."""
from timm.models import generate_default_cfgs, get_pretrained_cfg, model_entrypoint, register_model

ARGS = dict(embed_dim=384, depths=(1, 1, 4), num_heads=6)
BASES = {  # name: registered model it is made of
    'accelerated_fast_itpn_light': 'fast_itpn_small',
    'accelerated_fast_itpn_full': 'fast_itpn_small',
    'accelerated_itpn_full': 'itpn_small',
    'accelerated_fast_itpn_fpn': 'fast_itpn_small_fpn',
}


def _cfg(base):
    cfg = get_pretrained_cfg(base).to_dict(remove_source=True)
    return {key: value for key, value in cfg.items() if key not in ('architecture', 'tag')}


def _create(name, pretrained, pretrained_cfg=None, **kwargs):
    cfg = pretrained_cfg or get_pretrained_cfg(name)
    return model_entrypoint(BASES[name])(pretrained, pretrained_cfg=cfg, **dict(ARGS, **kwargs))


default_cfgs = generate_default_cfgs({name: _cfg(base) for name, base in BASES.items()})


@register_model
def accelerated_fast_itpn_light(pretrained=False, **kwargs):
    return _create('accelerated_fast_itpn_light', pretrained, **dict(acceleration='light', gather_window=3) | kwargs)


@register_model
def accelerated_fast_itpn_full(pretrained=False, **kwargs):
    return _create('accelerated_fast_itpn_full', pretrained, **dict(acceleration='full', gather_window=7) | kwargs)


@register_model
def accelerated_itpn_full(pretrained=False, **kwargs):
    return _create('accelerated_itpn_full', pretrained, **dict(acceleration='full', gather_window=3) | kwargs)


@register_model
def accelerated_fast_itpn_fpn(pretrained=False, **kwargs):
    return _create('accelerated_fast_itpn_fpn', pretrained, **dict(acceleration='full', gather_window=3) | kwargs)
