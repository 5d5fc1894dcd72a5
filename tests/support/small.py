"""Models of each family that are small enough to run often."""
import functools

import timm
import torch
import torch.nn as nn
from timm.layers import DropPath
from timm.optim import create_optimizer_v2

from support import golden

FAMILIES = ('fast_itpn_tiny', 'itpn_tiny')
PYRAMIDS = ('fast_itpn_tiny_fpn', 'itpn_tiny_fpn')
SIZES = dict(embed_dim=128, depths=(1, 2, 2), num_heads=2)
SMALL = dict(SIZES, img_size=64, num_classes=5)


def small_model(name, seed=0, **kwargs):
    """A model in evaluation mode; relative position biases, which start at zero, are filled."""
    torch.manual_seed(seed)
    model = timm.create_model(name, **{**SMALL, **kwargs}).eval()
    for key, parameter in model.named_parameters():
        if key.endswith('relative_position_bias_table') and not parameter.is_meta:
            nn.init.normal_(parameter)
    return model


def reduce_models(names, monkeypatch):
    """Models of these names become small, as if they were registered so."""
    from timm_itpn.tools import match

    monkeypatch.setattr(match, '_default', _default_of_reduced(tuple(names)))  # or it would keep these for other tests
    for name in names:
        create = functools.partial(timm.models.model_entrypoint(name), **SIZES, pyramid_dim=32)
        monkeypatch.setitem(timm.models._registry._model_entrypoints, name, create)


@functools.cache
def _default_of_reduced(names):
    """What the tools keep of models, while those of these names are small."""
    from timm_itpn.tools import match
    return functools.cache(match._default.__wrapped__)


def official_weights(**kwargs):
    """Weights of a small Fast-iTPN in official layout, filled as the goldens are; without classes, of pre-training."""
    from timm_itpn.weights.layout import native_to_official

    native = timm.create_model('fast_itpn_tiny', device='meta', **SIZES, pyramid_dim=32, **kwargs).state_dict()
    if not kwargs['num_classes']:
        native = {key: value for key, value in native.items() if not key.startswith('head.')}
        native['pretrain.mask_token'] = torch.empty(1, 1, 4 * SIZES['embed_dim'])
    return {key: golden.tensor(key, value.shape).float() for key, value in native_to_official(native).items()}


def num_in_pyramid(official):
    """How many values of official weights are of the pyramid."""
    starts = ('align_dim', 'fpn_modules', 'split_', 'block_', 'norm.')
    return sum(value.numel() for key, value in official.items() if key.startswith(starts))


def images(*shape, dtype=torch.float32):
    return torch.from_numpy(golden.noise('image', shape)).to(dtype)


def drop_path_rates(model):
    """Stochastic depth rate of each block, in order; all paths of a block have one."""
    rates = []
    for stage in model.stages:
        for block in stage.blocks:
            paths = [m.drop_prob for m in block.modules() if isinstance(m, DropPath)]
            rates.append(paths[0] if paths else 0.)
            assert len(set(paths)) <= 1
    return rates


def optimizer_scales(model, layer_decay):
    """Parameter name -> (factor on the learning rate, weight decay), as timm's optimizer factory sets them."""
    scale = {}
    groups = create_optimizer_v2(model, opt='adamw', weight_decay=0.05, layer_decay=layer_decay).param_groups
    for group in groups:
        for name, parameter in model.named_parameters():
            if any(parameter is p for p in group['params']):
                scale[name] = (group['lr_scale'], group['weight_decay'])
    return scale


class Adapter(nn.Module):
    """A layer with an addition, as those who fine-tune put in the place of a Linear layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.weight, self.bias = layer, layer.weight, layer.bias

    def forward(self, x):
        return self.layer(x) + 1.
