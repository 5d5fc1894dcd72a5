"""Official and native names of the weights, one table per family.

A table maps a native key to the official keys whose tensors, joined along the first axis, make it. Read one way it
converts an official file, read the other way it writes one.
"""
import logging
import re
from typing import Any, Dict, List, NamedTuple, Set, Tuple

import torch
from einops import rearrange

__all__ = ['FAST_ITPN', 'ITPN', 'Layout', 'is_official', 'key_table', 'native_family', 'official_to_native']

_logger = logging.getLogger(__name__)

Sources = Tuple[str, ...]
Table = Dict[str, Sources]


class Layout(NamedTuple):
    """Names of one family; each part is a table of its own.

    Attributes:
        family: Its name in messages.
        ends: Stem, position embedding and head.
        merge: A merge.
        mlp_block: A block of stage 1 or 2.
        attention_block: A block of stage 3.
        pyramid: The feature pyramid without its blocks.
        pretraining: Parts of a pre-training file that no backbone has, by the start of their names.
    """
    family: str
    ends: Table
    merge: Table
    mlp_block: Table
    attention_block: Table
    pyramid: Table
    pretraining: Dict[str, str]


def _same_leaves(native: str, official: str) -> Table:
    return {f'{native}.{leaf}': (f'{official}.{leaf}',) for leaf in ('weight', 'bias')}


def _under(native: str, official: str, table: Table) -> Table:
    """The table with `native` and `official` put before its names."""
    return {f'{native}.{key}': tuple(f'{official}.{source}' for source in row) for key, row in table.items()}


# level of the pyramid -> official name of the blocks in it, and of its last block
PYRAMID_BLOCKS = {0: 'block_8to4', 1: 'block_16to8'}
PYRAMID_OUT = {0: 'fpn_modules.2', 1: 'fpn_modules.1', 2: 'fpn_modules.0'}
PYRAMID_MLP_BLOCK: Table = {
    **_same_leaves('norm', 'norm2'),
    **_same_leaves('mlp.fc1', 'mlp.fc1'),
    **_same_leaves('mlp.fc2', 'mlp.fc2'),
}

FAST_ITPN = Layout(
    family='Fast-iTPN',
    ends={
        **_same_leaves('patch_embed.proj', 'patch_embed.proj'),
        'stages.2.pos_embed': ('pos_embed',),
        **_same_leaves('head.norm', 'fc_norm'),
        **_same_leaves('head.fc', 'head'),
    },
    merge={
        **_same_leaves('norm', 'norm'),
        **_same_leaves('reduction', 'reduction'),
    },
    mlp_block={
        **_same_leaves('norm', 'norm2'),
        **_same_leaves('mlp.fc1', 'mlp.fc1'),
        **_same_leaves('mlp.norm', 'mlp.ffn_ln'),
        **_same_leaves('mlp.fc2', 'mlp.fc2'),
    },
    attention_block={
        **_same_leaves('norm1', 'norm1'),
        'attn.qkv.weight': ('attn.q_proj.weight', 'attn.k_proj.weight', 'attn.v_proj.weight'),
        'attn.q_bias': ('attn.q_bias',),
        'attn.v_bias': ('attn.v_bias',),
        **_same_leaves('attn.proj', 'attn.proj'),
        'ls1.gamma': ('gamma_1',),
        **_same_leaves('norm2', 'norm2'),
        'mlp.fc1.weight': ('mlp.w1.weight', 'mlp.w2.weight'),
        'mlp.fc1.bias': ('mlp.w1.bias', 'mlp.w2.bias'),
        **_same_leaves('mlp.norm', 'mlp.ffn_ln'),
        **_same_leaves('mlp.fc2', 'mlp.w3'),
        'ls2.gamma': ('gamma_2',),
    },
    pyramid={
        **_same_leaves('norm', 'norm'),  # not the classifier's norm: that one is fc_norm
        **_same_leaves('levels.2.align', 'align_dim_16tofpn'),
        **_same_leaves('levels.1.align', 'align_dim_16to8'),
        **_same_leaves('levels.1.split.norm', 'split_16to8.norm'),
        **_same_leaves('levels.1.split.reduction', 'split_16to8.reduction'),
        **_same_leaves('levels.0.align', 'align_dim_8to4'),
        **_same_leaves('levels.0.split.norm', 'split_8to4.norm'),
        **_same_leaves('levels.0.split.reduction', 'split_8to4.reduction'),
    },
    pretraining={
        'mask_token': 'mask token',
        'decoder_embed.': 'decoder',
        'lm_head.': 'teacher head',
    },
)

ITPN = Layout(
    family='iTPN',
    ends={
        **_same_leaves('patch_embed.proj', 'patch_embed.proj'),
        **_same_leaves('patch_embed.norm', 'patch_embed.norm'),
        'stages.2.pos_embed': ('absolute_pos_embed',),
        **_same_leaves('head.norm', 'fc_norm'),
        **_same_leaves('head.fc', 'head'),
    },
    merge={
        **_same_leaves('norm', 'norm'),
        'reduction.weight': ('reduction.weight',),
    },
    mlp_block={
        **_same_leaves('norm', 'norm2'),
        **_same_leaves('mlp.fc1', 'mlp.fc1'),
        **_same_leaves('mlp.fc2', 'mlp.fc2'),
        'ls.gamma': ('gamma_2',),
    },
    attention_block={
        **_same_leaves('norm1', 'norm1'),
        **_same_leaves('attn.qkv', 'attn.qkv'),
        **_same_leaves('attn.proj', 'attn.proj'),
        'rel_pos_bias.relative_position_bias_table': ('attn.relative_position_bias_table',),
        'ls1.gamma': ('gamma_1',),
        **_same_leaves('norm2', 'norm2'),
        **_same_leaves('mlp.fc1', 'mlp.fc1'),
        **_same_leaves('mlp.fc2', 'mlp.fc2'),
        'ls2.gamma': ('gamma_2',),
    },
    pyramid={
        **_same_leaves('levels.2.align', 'align_dim_16tofpn'),
        'levels.1.align.weight': ('align_dim_16to8.weight',),
        **_same_leaves('levels.1.split.norm', 'split_16to8.norm'),
        'levels.1.split.reduction.weight': ('split_16to8.reduction.weight',),
        'levels.0.align.weight': ('align_dim_8to4.weight',),
        **_same_leaves('levels.0.split.norm', 'split_8to4.norm'),
        'levels.0.split.reduction.weight': ('split_8to4.reduction.weight',),
    },
    pretraining={
        'mask_token': 'mask token',
        'decoder_': 'decoder',
        'norm.': 'decoder',  # not the classifier's norm: that one is fc_norm
        'lm_head.': 'teacher head',
        'cls_pt_layers.': 'auxiliary branch',
        'norm_cls.': 'auxiliary branch',
        'lm_cls_head.': 'auxiliary branch',
    },
)


def key_table(layout: Layout, depths: Tuple[int, int, int], pyramid_depth: int = 0) -> Table:
    """Native key -> official keys, for a model with `depths` blocks in its stages.

    The official list `blocks` counts on through all stages, and each merge takes a number too.

    Args:
        layout: Names of the family.
        depths: Blocks of stages 1, 2 and 3.
        pyramid_depth: Blocks in each of the levels at strides 8 and 4, 0 for a model without pyramid.
    """
    table = dict(layout.ends)
    number = 0
    for stage, depth in enumerate(depths):
        rows = [(f'blocks.{i}', layout.attention_block if stage == 2 else layout.mlp_block) for i in range(depth)]
        if stage > 0:
            rows.insert(0, ('downsample', layout.merge))
        for name, layer in rows:
            table.update(_under(f'stages.{stage}.{name}', f'blocks.{number}', layer))
            number += 1
    if pyramid_depth:
        table.update({f'pyramid.{native}': official for native, official in layout.pyramid.items()})
        for level, official in PYRAMID_OUT.items():
            table.update(_under(f'pyramid.levels.{level}.out', official, PYRAMID_MLP_BLOCK))
        for level, official in PYRAMID_BLOCKS.items():
            for i in range(pyramid_depth):
                table.update(_under(f'pyramid.levels.{level}.blocks.{i}', f'{official}.{i}', PYRAMID_MLP_BLOCK))
    return table


def is_official(state_dict: Dict[str, torch.Tensor]) -> bool:
    """True if the keys are those of an official file: one flat list of blocks with two merges among them."""
    return len(_merges(state_dict)) == 2


def native_family(state_dict: Dict[str, Any]) -> str:
    """Family of native weights: only the stem of iTPN ends in a norm."""
    return ITPN.family if 'patch_embed.norm.weight' in state_dict else FAST_ITPN.family


def official_to_native(state_dict: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Convert official names and shapes to native ones, the pyramid's too; what only pre-training needs stays behind.

    Args:
        state_dict: Official weights, of a classifier or of a whole pre-training model.

    Raises:
        ValueError: A key is unknown, or a tensor that is packed with others is missing.
    """
    first, second = _merges(state_dict)
    layout = FAST_ITPN if state_dict[f'blocks.{first}.reduction.weight'].ndim == 4 else ITPN
    last = max(int(key.split('.')[1]) for key in state_dict if key.startswith('blocks.'))
    table = key_table(layout, (first, second - first - 1, last - second), _pyramid_depth(state_dict))

    native: Dict[str, torch.Tensor] = {}
    used: Set[str] = set()
    for key, sources in table.items():
        present = [source for source in sources if source in state_dict]
        if not present:
            continue  # whether the model can do without is for the caller to say
        if len(present) < len(sources):
            missing = ', '.join(sorted(set(sources) - set(present)))
            raise ValueError(f'The checkpoint is incomplete: it has {", ".join(present)}, but not {missing}.')
        tensors = [_without_kernel_axes(state_dict[source]) for source in sources]
        native[key] = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        used.update(sources)

    left = [key for key in state_dict if key not in used and not key.endswith('relative_position_index')]
    unknown = [key for key in left if not key.startswith(tuple(layout.pretraining))]
    if unknown:
        raise ValueError(f'The checkpoint has keys that are not of an official {layout.family}: {", ".join(unknown)}.')
    if left:
        parts = sorted({part for start, part in layout.pretraining.items() if any(k.startswith(start) for k in left)})
        _logger.info(f'Left out {len(left)} tensors that only pre-training needs ({", ".join(parts)}).')
    return native


def _merges(state_dict: Dict[str, torch.Tensor]) -> List[int]:
    found = (re.fullmatch(r'blocks\.(\d+)\.reduction\.weight', key) for key in state_dict)
    return sorted(int(match.group(1)) for match in found if match)


def _pyramid_depth(state_dict: Dict[str, torch.Tensor]) -> int:
    starts = tuple(PYRAMID_BLOCKS.values())
    return max((int(key.split('.')[1]) + 1 for key in state_dict if key.startswith(starts)), default=0)


def _without_kernel_axes(tensor: torch.Tensor) -> torch.Tensor:
    """Official 1x1 convolutions are Linear layers here."""
    return rearrange(tensor, 'o i 1 1 -> o i') if tensor.shape[2:] == (1, 1) else tensor
