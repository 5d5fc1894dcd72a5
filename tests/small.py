"""Models of each family that are small enough to run often."""
import golden
import timm
import torch
import torch.nn as nn

FAMILIES = ('fast_itpn_tiny', 'itpn_tiny')
PYRAMIDS = ('fast_itpn_tiny_fpn', 'itpn_tiny_fpn')
SMALL = dict(embed_dim=128, depths=(1, 2, 2), num_heads=2, img_size=64, num_classes=5)


def small_model(name, seed=0, **kwargs):
    """A model in evaluation mode; relative position biases, which start at zero, are filled."""
    torch.manual_seed(seed)
    model = timm.create_model(name, **{**SMALL, **kwargs}).eval()
    for key, parameter in model.named_parameters():
        if key.endswith('relative_position_bias_table') and not parameter.is_meta:
            nn.init.normal_(parameter)
    return model


def images(*shape, dtype=torch.float32):
    return torch.from_numpy(golden.noise('image', shape)).to(dtype)
