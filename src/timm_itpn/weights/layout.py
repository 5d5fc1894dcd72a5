"""Official and native names of the weights, one table per family.

A table maps a native key to the official keys whose tensors, joined along the first axis, make it. Read one way it
converts an official file, read the other way it writes one. What only pre-training needs keeps its official name, with
`pretrain.` before it, and so does all of a tracker but stem and stages, with `tracking.` (see `tracker.py`).
"""
import re
from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import torch
from einops import rearrange

PYRAMID = 'pyramid.'
PRETRAIN = 'pretrain.'
TRACKING = 'tracking.'
POS_EMBED = 'stages.2.pos_embed'
ALL_POSITIONS = TRACKING + POS_EMBED  # position embedding of several grids, one after the other
TABLE = '.relative_position_bias_table'
CLASSIFIER = ('head.fc.weight', 'head.fc.bias')
CLASSIFIER_NORM = ('head.norm.weight', 'head.norm.bias')
NUMBER = r'(\d{1,3})'  # of a block; a larger one is an unknown key, not a table of a billion blocks

Table = dict[str, tuple[str, ...]]


class Layout(NamedTuple):
    """Names of one family; each part is a table of its own."""
    family: str  # its name in messages
    ends: Table  # stem, position embedding and head
    merge: Table  # a merge, or a split of the pyramid
    mlp_block: Table  # a block of stage 1 or 2
    attention_block: Table  # a block of stage 3
    pyramid: Table  # the layers of the feature pyramid that are named alone
    pretraining: Table  # parts of a pre-training file that no backbone has, and how the official keys of each start
    conv1x1: str  # native weights of Linear layers that are 1x1 convolutions in official files, a regular expression


def _layers(names: dict[str, str]) -> Table:
    """Rows for weight and bias of layers, native name -> official name."""
    leaves = ('weight', 'bias')
    return {f'{native}.{leaf}': (f'{official}.{leaf}',) for native, official in names.items() for leaf in leaves}


def _under(native: str, official: str, table: Table) -> Table:
    """The table with `native` and `official` put before its names."""
    return {f'{native}.{key}': tuple(f'{official}.{source}' for source in row) for key, row in table.items()}


# what the families have in common
ENDS = _layers({'patch_embed.proj': 'patch_embed.proj', 'head.norm': 'fc_norm', 'head.fc': 'head'})
MLP_BLOCK = _layers({'norm': 'norm2', 'mlp.fc1': 'mlp.fc1', 'mlp.fc2': 'mlp.fc2'})
ATTENTION_BLOCK: Table = {
    **_layers({'norm1': 'norm1', 'attn.proj': 'attn.proj', 'norm2': 'norm2'}),
    'ls1.gamma': ('gamma_1',),
    'ls2.gamma': ('gamma_2',),
}
PRETRAINING: Table = {'mask token': ('mask_token',), 'decoder': ('decoder_',), 'teacher head': ('lm_head.',)}

FAST_ITPN = Layout(
    family='Fast-iTPN',
    ends={**ENDS, POS_EMBED: ('pos_embed',)},
    merge=_layers({'norm': 'norm', 'reduction': 'reduction'}),
    mlp_block={**MLP_BLOCK, **_layers({'mlp.norm': 'mlp.ffn_ln'})},
    attention_block={
        **ATTENTION_BLOCK,
        'attn.qkv.weight': ('attn.q_proj.weight', 'attn.k_proj.weight', 'attn.v_proj.weight'),
        'attn.qkv_bias.q_bias': ('attn.q_bias',),
        'attn.qkv_bias.v_bias': ('attn.v_bias',),
        **_layers({'mlp.fc1_g': 'mlp.w1', 'mlp.fc1_x': 'mlp.w2', 'mlp.norm': 'mlp.ffn_ln', 'mlp.fc2': 'mlp.w3'}),
    },
    pyramid=_layers({
        'norm': 'norm',  # not the classifier's norm: that one is fc_norm
        'levels.2.align': 'align_dim_16tofpn',
        'levels.1.align': 'align_dim_16to8',
        'levels.0.align': 'align_dim_8to4',
    }),
    pretraining=PRETRAINING,
    conv1x1=r'(stages\.[01]\.blocks|pyramid)\..*(mlp\.fc[12]|align)\.weight',
)

ITPN = Layout(
    family='iTPN',
    ends={**ENDS, **_layers({'patch_embed.norm': 'patch_embed.norm'}), POS_EMBED: ('absolute_pos_embed',)},
    merge={**_layers({'norm': 'norm'}), 'reduction.weight': ('reduction.weight',)},
    mlp_block={**MLP_BLOCK, 'ls.gamma': ('gamma_2',)},
    attention_block={
        **ATTENTION_BLOCK,
        **_layers({'attn.qkv': 'attn.qkv', 'mlp.fc1': 'mlp.fc1', 'mlp.fc2': 'mlp.fc2'}),
        'rel_pos_bias.relative_position_bias_table': ('attn.relative_position_bias_table',),
    },
    pyramid={
        **_layers({'levels.2.align': 'align_dim_16tofpn'}),
        'levels.1.align.weight': ('align_dim_16to8.weight',),
        'levels.0.align.weight': ('align_dim_8to4.weight',),
    },
    pretraining={
        **PRETRAINING,
        'decoder': ('decoder_', 'norm.'),  # not the classifier's norm: that one is fc_norm
        'auxiliary branch': ('cls_pt_layers.', 'norm_cls.', 'lm_cls_head.'),
    },
    conv1x1='',  # none
)


def key_table(layout: Layout, depths: tuple[int, int, int], pyramid_depth: int = 0) -> Table:
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
        for level in range(3):
            table.update(_under(f'pyramid.levels.{level}.out', f'fpn_modules.{2 - level}', MLP_BLOCK))
        for level, strides in enumerate(('8to4', '16to8')):
            table.update(_under(f'pyramid.levels.{level}.split', f'split_{strides}', layout.merge))
            for i in range(pyramid_depth):
                table.update(_under(f'pyramid.levels.{level}.blocks.{i}', f'block_{strides}.{i}', MLP_BLOCK))
    return table


def find_prefixes(keys: Iterable[str]) -> list[str]:
    """Prefixes under which a whole network lies, official or native: '' or dotted names with a dot behind."""
    official = re.compile(rf'(.*\.)?blocks\.{NUMBER}\.reduction\.weight')
    native = re.compile(r'(.*\.)?stages\.2\.downsample\.norm\.weight')
    num_merges: Counter[str] = Counter()
    found = []
    for key in keys:
        if match := native.fullmatch(key):
            found.append(match[1] or '')
        elif match := official.fullmatch(key):
            num_merges[match[1] or ''] += 1
    return found + [prefix for prefix, num in num_merges.items() if num == 2]


def layout_of(keys: Collection[str]) -> str:
    """Layout of keys: 'native', 'official' (one flat list of blocks with two merges among them), or '' for neither."""
    keys = [key for key in keys if isinstance(key, str)]
    if len(_merges(keys)) == 2:
        return 'official'
    return 'native' if any(key.startswith('stages.') for key in keys) else ''


def native_layout(state_dict: dict[str, Any]) -> Layout:
    """Family of native weights: only the stem of iTPN ends in a norm."""
    return ITPN if 'patch_embed.norm.weight' in state_dict else FAST_ITPN


def native_depths(state_dict: dict[str, Any]) -> tuple[int, int, int]:
    """Blocks of stages 1, 2 and 3 in native weights."""
    first, second, third = (_count(rf'stages\.{stage}\.blocks\.{NUMBER}\.', state_dict) for stage in range(3))
    return first, second, third


def native_pyramid_depth(state_dict: dict[str, Any]) -> int:
    """Blocks in each of the finer levels of the pyramid in native weights, 0 without pyramid."""
    return _count(rf'pyramid\.levels\.[01]\.blocks\.{NUMBER}\.', state_dict)


def pretraining_part(key: str, layout: Layout) -> str:
    """Name of the part of pre-training that an official key belongs to, '' for none."""
    return next((part for part, starts in layout.pretraining.items() if key.startswith(starts)), '')


def is_fused(keys: Iterable[str]) -> bool:
    """Whether native keys are those of a copy that `timm_itpn.fuse` made."""
    return any(re.fullmatch(rf'stages\.2\.blocks\.{NUMBER}\.qkv\.weight', key) for key in keys)


def current_names(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Native weights under the names of this version: before 0.1, Fast-iTPN had gate and value in one layer."""
    if native_layout(state_dict) is not FAST_ITPN:
        return state_dict
    current: dict[str, Any] = {}
    for key, value in state_dict.items():
        packed = re.fullmatch(r'(stages\.2\.blocks\.\d+\.mlp)\.fc1\.(weight|bias)', key)
        if packed:
            current[f'{packed[1]}.fc1_g.{packed[2]}'], current[f'{packed[1]}.fc1_x.{packed[2]}'] = value.chunk(2)
        else:
            current[re.sub(r'\.attn\.([qv]_bias)$', r'.attn.qkv_bias.\1', key)] = value
    return current


def official_to_native(state_dict: dict[str, torch.Tensor], unknown: str | None = None) -> dict[str, torch.Tensor]:
    """Convert official names and shapes to native ones, those of the pyramid and of pre-training too.

    Index buffers of the relative position bias are left out: they follow from the size of its table.

    Args:
        state_dict: Official weights, of a classifier or of a whole pre-training model.
        unknown: Put before what is unknown or incomplete, None = refuse it; `TRACKING` before all but stem and stages.

    Raises:
        ValueError: A key is unknown, or a tensor that is packed with others is missing.
    """
    first, second = _merges(state_dict)
    layout = FAST_ITPN if state_dict[f'blocks.{first}.reduction.weight'].ndim == 4 else ITPN
    depths = (first, second - first - 1, _count(rf'blocks\.{NUMBER}\.', state_dict) - second - 1)
    pyramid_depth = _count(rf'block_(?:8to4|16to8)\.{NUMBER}\.', state_dict)

    native: dict[str, torch.Tensor] = {}
    left = {key for key in state_dict if not key.endswith('relative_position_index')}
    for key, sources in key_table(layout, depths, pyramid_depth).items():
        present = [source for source in sources if source in state_dict]
        is_own = unknown == TRACKING and key.startswith(('head.', PYRAMID))
        if is_own or not present or (len(present) < len(sources) and unknown is not None):
            continue  # whether the model can do without is for the caller to say
        if len(present) < len(sources):
            missing = ', '.join(sorted(set(sources) - set(present)))
            raise ValueError(f'The checkpoint is incomplete: it has {", ".join(present)}, but not {missing}.')
        tensors = [state_dict[source] for source in sources]
        if len(tensors) > 1 and (not tensors[0].ndim or len({(t.shape[1:], t.dtype) for t in tensors}) > 1):
            raise ValueError(f'The shapes or types of {", ".join(sources)} differ: they are not of one model.')
        native[key] = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        if re.fullmatch(layout.conv1x1, key) and native[key].shape[2:] == (1, 1):
            native[key] = rearrange(native[key], 'o i 1 1 -> o i')
        left.difference_update(sources)

    others = sorted(key for key in left if unknown == TRACKING or not pretraining_part(key, layout))
    if others and unknown is None:
        raise ValueError(
            f'The checkpoint has keys that are not of an official {layout.family}: {", ".join(others)}. Those of a '
            'tracker are read with --role, or by tracking.JointEncoder.load.')
    return native | {(unknown or '' if key in others else PRETRAIN) + key: state_dict[key] for key in sorted(left)}


def to_current(state_dict: dict[str, Any], unknown: str | None = None) -> dict[str, torch.Tensor]:
    """Weights in either layout under the native names of this version, in shapes that code for weights may rely on.

    Raises:
        ValueError: They are of a fused copy; a tensor is empty, has another number of dimensions than its kind, or less
            memory than values; or as by `official_to_native`.
    """
    if is_fused(state_dict):
        raise ValueError(
            'These weights are of a fused copy (timm_itpn.fuse), which fit fused models only: save the state dict of '
            'the model that it was made from, and use that.')
    for key, value in state_dict.items():  # first of all: the next line may join what takes no memory yet
        if type(value) in (torch.Tensor, torch.nn.Parameter) and not value.is_meta:
            if value.layout != torch.strided or value.numel() * value.itemsize > value.untyped_storage().nbytes():
                raise ValueError(f'{key} has the shape {list(value.shape)}, but memory for a part of that only.')
    native = state_dict if layout_of(state_dict) == 'native' else official_to_native(state_dict, unknown)
    for key, value in native.items():
        num_dims = _num_dims(key, native_layout(native))
        if num_dims and isinstance(value, torch.Tensor) and (value.ndim != num_dims or 0 in value.shape):
            raise ValueError(f'{key} has the shape {list(value.shape)}, but needs {num_dims} dimensions, none empty.')
    return current_names(native)


def _num_dims(key: str, layout: Layout) -> int:
    """Number of dimensions of a native tensor, 0 if its key says nothing of them."""
    if not key.startswith(('patch_embed.', 'stages.', 'pyramid.', 'head.')):
        return 0
    if key == POS_EMBED:
        return 3
    if key.endswith(('.bias', '_bias', '.gamma')) or re.search(r'norm\d?\.weight$', key):
        return 1
    is_conv = key == 'patch_embed.proj.weight' or layout is FAST_ITPN and key.endswith('reduction.weight')
    return 4 if is_conv else 2 if key.endswith(('.weight', TABLE)) else 0


def native_to_official(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert native names and shapes to official ones; the reverse of `official_to_native`.

    Args:
        state_dict: Native weights.

    Raises:
        ValueError: A key is unknown.
    """
    state_dict = dict(state_dict)
    if ALL_POSITIONS in state_dict:
        state_dict[POS_EMBED] = state_dict.pop(ALL_POSITIONS)
    layout = native_layout(state_dict)
    table = key_table(layout, native_depths(state_dict), native_pyramid_depth(state_dict))
    unknown = [key for key in state_dict if key not in table and not key.startswith((PRETRAIN, TRACKING))]
    if unknown:
        raise ValueError(f'The checkpoint has keys that are not of a native {layout.family}: {", ".join(unknown)}.')
    official: dict[str, torch.Tensor] = {}
    for key, value in state_dict.items():
        if key not in table:
            official[key.removeprefix(PRETRAIN).removeprefix(TRACKING)] = value
            continue
        if re.fullmatch(layout.conv1x1, key):
            value = rearrange(value, 'o i -> o i 1 1')
        num = len(table[key])
        if len(value) % num:
            raise ValueError(f'{key} has {len(value)} rows, which is not {num} times a whole number.')
        official.update(zip(table[key], value.chunk(num)))
    return official


def _merges(keys: Iterable[str]) -> list[int]:
    found = (re.fullmatch(rf'blocks\.{NUMBER}\.reduction\.weight', key) for key in keys)
    return sorted(int(match.group(1)) for match in found if match)


def _count(pattern: str, keys: Iterable[str]) -> int:
    """One more than the largest number that `pattern` finds at the start of a key."""
    found = (re.match(pattern, key) for key in keys)
    return max((int(match.group(1)) + 1 for match in found if match), default=0)
