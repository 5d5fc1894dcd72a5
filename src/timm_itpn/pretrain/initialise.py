"""Initial weights of a Fast-iTPN that is pre-trained; the other models start as they are created."""
import math

import torch
import torch.nn as nn

from ..models.itpn import ITPN

__all__ = ['initialise']

PACKED = {'attn.qkv': 3}  # Linear layers of stage 3 that are several matrices in one
SCALED = ('mlp.fc1', 'mlp.fc1_g', 'mlp.fc1_x', 'mlp.fc2', 'attn.proj')


@torch.no_grad()
def initialise(backbone: ITPN) -> None:
    """Initialise a Fast-iTPN for pre-training, as published.

    Matrices of stage 3 are xavier normal, each of its own, their biases zero; the stem is xavier uniform, seen as a
    matrix; positions are trunc normal of 0.02, cut at one standard deviation. Then every MLP, values and what follows
    attention are scaled by sqrt(ln(2 * depth of stage 3)).
    """
    if backbone.family != 'fast_itpn':
        return
    third = backbone.stages[2]
    stem = backbone.patch_embed.proj.weight
    stem.copy_(nn.init.xavier_uniform_(torch.empty_like(stem.flatten(1))).reshape(stem.shape))
    nn.init.trunc_normal_(third.pos_embed, std=.02, a=-.02, b=.02)
    scale = math.sqrt(math.log(2 * len(third.blocks)))
    for name, module in backbone.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        leaf = '.'.join(name.split('.')[-2:])
        if name.startswith('stages.2.blocks.'):
            for matrix in module.weight.chunk(PACKED.get(leaf, 1)):
                nn.init.xavier_normal_(matrix)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if leaf == 'attn.qkv':
            module.weight.chunk(3)[2].mul_(scale)  # the values
        elif leaf in SCALED:
            module.weight.mul_(scale)
            module.bias.mul_(scale)
