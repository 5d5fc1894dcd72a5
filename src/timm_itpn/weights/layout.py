"""Official and native names of the Fast-iTPN weights, in one table.

The table maps a native key to the official keys whose tensors, joined along the first axis, make it. Read one way it
converts an official file, read the other way it writes one.
"""
import logging
import re
from typing import Dict, List, Set, Tuple

import torch
from einops import rearrange

__all__ = ['is_official', 'key_table', 'official_to_native']

_logger = logging.getLogger(__name__)

Sources = Tuple[str, ...]


def _same_leaves(native: str, official: str) -> Dict[str, Sources]:
    return {f'{native}.{leaf}': (f'{official}.{leaf}',) for leaf in ('weight', 'bias')}


ENDS: Dict[str, Sources] = {
    **_same_leaves('patch_embed.proj', 'patch_embed.proj'),
    'stages.2.pos_embed': ('pos_embed',),
    **_same_leaves('head.norm', 'fc_norm'),
    **_same_leaves('head.fc', 'head'),
}
MERGE: Dict[str, Sources] = {
    **_same_leaves('norm', 'norm'),
    **_same_leaves('reduction', 'reduction'),
}
MLP_BLOCK: Dict[str, Sources] = {
    **_same_leaves('norm', 'norm2'),
    **_same_leaves('mlp.fc1', 'mlp.fc1'),
    **_same_leaves('mlp.norm', 'mlp.ffn_ln'),
    **_same_leaves('mlp.fc2', 'mlp.fc2'),
}
ATTENTION_BLOCK: Dict[str, Sources] = {
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
}

# Parts of a pre-training file that a backbone has no use for, by the start of their names.
PRETRAINING_PARTS: Dict[str, str] = {
    'mask_token': 'mask token',
    'align_dim_': 'feature pyramid',
    'fpn_modules.': 'feature pyramid',
    'split_16to8.': 'feature pyramid',
    'split_8to4.': 'feature pyramid',
    'block_16to8.': 'feature pyramid',
    'block_8to4.': 'feature pyramid',
    'decoder_embed.': 'decoder',
    'norm.': 'norm before the pyramid',  # not the classifier's norm: that one is fc_norm
    'lm_head.': 'teacher head',
}


def key_table(depths: Tuple[int, int, int]) -> Dict[str, Sources]:
    """Native key -> official keys, for a model with `depths` blocks in its stages.

    The official list `blocks` counts on through all stages, and each merge takes a number too.
    """
    table = dict(ENDS)
    number = 0
    for stage, depth in enumerate(depths):
        rows = [(f'blocks.{i}.', ATTENTION_BLOCK if stage == 2 else MLP_BLOCK) for i in range(depth)]
        if stage > 0:
            rows.insert(0, ('downsample.', MERGE))
        for name, layer in rows:
            for native, official in layer.items():
                table[f'stages.{stage}.{name}{native}'] = tuple(f'blocks.{number}.{key}' for key in official)
            number += 1
    return table


def is_official(state_dict: Dict[str, torch.Tensor]) -> bool:
    """True if the keys are those of an official Fast-iTPN file: one flat list of blocks with two merges among them."""
    return len(_merges(state_dict)) == 2


def official_to_native(state_dict: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Convert official names and shapes to native ones; the parts that only pre-training needs stay behind.

    Args:
        state_dict: Official weights, of a classifier or of a whole pre-training model.

    Raises:
        ValueError: A key is unknown, or a tensor that is packed with others is missing.
    """
    first, second = _merges(state_dict)
    last = max(int(key.split('.')[1]) for key in state_dict if key.startswith('blocks.'))
    table = key_table((first, second - first - 1, last - second))

    native: Dict[str, torch.Tensor] = {}
    used: Set[str] = set()
    for key, sources in table.items():
        present = [source for source in sources if source in state_dict]
        if not present:
            continue  # whether the model can do without is for the caller to say
        if len(present) < len(sources):
            missing = ', '.join(sorted(set(sources) - set(present)))
            raise ValueError(f'The checkpoint is incomplete: it has {", ".join(present)}, but not {missing}.')
        tensors = [_without_kernel_axes(key, state_dict[source]) for source in sources]
        native[key] = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        used.update(sources)

    left = [key for key in state_dict if key not in used]
    unknown = [key for key in left if not key.startswith(tuple(PRETRAINING_PARTS))]
    if unknown:
        raise ValueError(f'The checkpoint has keys that are not of a Fast-iTPN: {", ".join(unknown)}.')
    if left:
        parts = sorted({part for start, part in PRETRAINING_PARTS.items() if any(k.startswith(start) for k in left)})
        _logger.info(f'Left out {len(left)} tensors that only pre-training needs ({", ".join(parts)}).')
    return native


def _merges(state_dict: Dict[str, torch.Tensor]) -> List[int]:
    found = (re.fullmatch(r'blocks\.(\d+)\.reduction\.weight', key) for key in state_dict)
    return sorted(int(match.group(1)) for match in found if match)


def _without_kernel_axes(native_key: str, tensor: torch.Tensor) -> torch.Tensor:
    """Official 1x1 convolutions are Linear layers here."""
    if native_key.endswith(('.fc1.weight', '.fc2.weight')) and tensor.ndim == 4:
        return rearrange(tensor, 'o i 1 1 -> o i')
    return tensor
