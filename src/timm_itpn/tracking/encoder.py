"""The encoder of visual trackers: templates of the target and a search image, encoded together.

Each image goes through the stem and stages 1 and 2 alone; stage 3 runs on the tokens of all of them, before and behind
which a tracker may put tokens of its own.
"""
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from timm.layers import LayerNorm
from timm.models import checkpoint

from ..acceleration.migration import Left, depart, replenish
from ..acceleration.schedule import num_leaving, parse_schedule
from ..layers.patch_embed import ImageSize, token_grid
from ..layers.stages import AttentionStage
from ..models.itpn import ITPN
from ..ops.attention import as_bias, attention_weights
from ..weights.checkpoint import StateDict, listed, unwrap, why_no_weights
from ..weights.layout import TRACKING
from ..weights.read import read_contents
from ..weights.tracker import from_encoder, to_encoder
from .embeddings import add_types, role_pos_embed

_logger = logging.getLogger(__name__)

Parts = Mapping[str, torch.Tensor]  # role -> images, tokens or type embeddings


class JointEncoder(nn.Module):
    """A model of this package for several images at once.

    Args:
        model: The model. The encoder takes it over, without its classifier, pyramid and position embedding.
        roles: Role of an image, such as 'search' or 'template' -> its side or (height, width), multiples of 16 pixels;
            in the order that their positions have in a tracker's file.
        positions: How the position embeddings of the roles are made of the model's: 'half_pixel', 'corners' or 'crop';
            see `tracking.embeddings.role_pos_embed`.
        migrate: Block of stage 3 -> how many tokens of an image of the first role leave there (int), or which share of
            them (float), to come back after the last block; None for none. `forward` does so, `run` does not.
        norm: Norm of the tokens after stage 3, None for a new LayerNorm. That of a pre-training file is
            `model.pyramid.norm` of a Fast-iTPN with `pyramid=True`.
        names: 'norm' or 'pos_embed.ROLE' -> its name in a tracker's file, where that is not `fc_norm`, or `pos_embed`
            for all roles.

    Attributes:
        grid_sizes: Role -> rows and columns of its tokens.
        pos_embed: Role -> position embedding (1, N, dim).

    Raises:
        ValueError: The model has no stage 3, or one with windows or relative position bias; a side is not a multiple of
            16, roles or names cannot be, `positions` is unknown, or more tokens would leave than there are.
    """

    def __init__(
            self,
            model: ITPN,
            roles: Mapping[str, ImageSize],
            positions: str = 'half_pixel',
            migrate: Mapping[int, int | float] | None = None,
            norm: nn.Module | None = None,
            names: Mapping[str, str] | None = None,
    ):
        super().__init__()
        self.names = {'norm': 'fc_norm', **(names or {})}
        taken = dir(nn.ParameterDict())
        if not roles or any(not role or '.' in role or role in taken for role in roles):
            raise ValueError(f'roles {list(roles)} cannot be: give names without dots, none that a dict has (keys).')
        if not self.names.keys() <= {'norm', *(f'pos_embed.{role}' for role in roles)}:
            raise ValueError(f"names {names} cannot be: its keys are 'norm' and 'pos_embed.ROLE'.")
        stage: Any = model.stages[-1]
        if type(model.stages[-1]) is not AttentionStage or stage.blocks[0].rel_pos_bias is not None:
            raise ValueError(
                'The tokens of several images are no grid: create the model with rel_pos_bias=False, without '
                'acceleration and with all stages.')
        self.in_chans = model.in_chans
        self.embed_dim = model.embed_dim
        self.positions = positions
        self.grid_sizes = {role: token_grid(size) for role, size in roles.items()}
        schedule = parse_schedule(len(stage.blocks), migrate=migrate)
        height, width = next(iter(self.grid_sizes.values()))
        self.leaving = num_leaving(list(schedule.migrate), height * width) if schedule else []
        stem: Any = model.patch_embed
        stem.strict_img_size = False
        self.patch_embed = stem
        self.stages = model.stages
        own = stage.pos_embed.detach()
        self.pos_embed = nn.ParameterDict([  # it would sort a dict
            (role, nn.Parameter(role_pos_embed(own, grid_size, stage.grid_size, positions).clone()))
            for role, grid_size in self.grid_sizes.items()])
        stage.pos_embed = None
        self.norm = LayerNorm(self.embed_dim, device=own.device, dtype=own.dtype) if norm is None else norm
        self.register_load_state_dict_pre_hook(convert_on_load)

    def role_positions(self, pos_embed: torch.Tensor, roles: list[str]) -> StateDict:
        """Embeddings by their keys, of one (1, N, dim) for all roles in order or a square grid, else ValueError."""
        sizes, num = {role: self.grid_sizes[role] for role in roles}, pos_embed.shape[1]
        num_tokens, side = [height * width for height, width in sizes.values()], math.isqrt(num)
        if num == sum(num_tokens):
            _logger.info(f'Took the position embedding for that of {sizes}, in this order.')
            parts = list(pos_embed.split(num_tokens, dim=1))
        elif num == side * side:
            parts = [role_pos_embed(pos_embed, new, (side, side), self.positions) for new in sizes.values()]
        else:
            raise ValueError(
                f'The position embedding has {num} tokens, which is no square, and the roles have others, {sizes}: '
                'create the encoder with the sizes of the file.')
        return {f'pos_embed.{role}': part for role, part in zip(sizes, parts)}

    def no_weight_decay(self) -> set[str]:
        return {f'pos_embed.{role}' for role in self.pos_embed}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        stage: Any
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def embed(self, images: torch.Tensor, role: str, types: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens before stage 3, with positions. They do not depend on other images, so they may be kept.

        Args:
            images: (B, in_chans, H, W), or n for each sample, (B, n, in_chans, H, W).
            role: What they are.
            types: Type embeddings, added to the tokens: see `tracking.embeddings.add_types`.

        Returns:
            (B, N, dim), or (B, n, N, dim).

        Raises:
            ValueError: The role is unknown, or the images are not of its size.
        """
        height, width = self._grid_size(role)
        if images.ndim < 4 or images.shape[-3:] != (self.in_chans, 16 * height, 16 * width):
            raise ValueError(
                f'The role {role!r} takes images ({self.in_chans}, {16 * height}, {16 * width}) in batches, or their '
                f'tokens ({height * width}, {self.embed_dim}), not {tuple(images.shape)}: resize the images.')
        third: Any = self.stages[2]
        x = self.stages[1](self.stages[0](self.patch_embed(images.flatten(0, -4))))  # (B, n, C, H, W) -> (B*n, h, w, C)
        x = third.pos_drop(third.downsample(x).flatten(1, 2) + self.pos_embed[role])  # (B*n, h, w, C) -> (B*n, N, C)
        x = x.reshape(*images.shape[:-3], *x.shape[1:])
        return x if types is None else add_types(x, types)

    def _grid_size(self, role: str) -> tuple[int, int]:
        if role not in self.grid_sizes:
            raise ValueError(f'The role {role!r} is unknown: the encoder is for {", ".join(self.grid_sizes)}.')
        return self.grid_sizes[role]

    def join(self, parts: Parts, before: torch.Tensor | None = None, after: torch.Tensor | None = None) -> torch.Tensor:
        """One sequence of tokens, (B, N, dim), in the type of the encoder.

        Args:
            parts: Role -> tokens (B or 1, N, dim) or (B or 1, n, N, dim), in the order that they are to have.
            before: Tokens to put in front, (B or 1, K, dim).
            after: Tokens to put behind, likewise.
        """
        tokens = [before, *(part.flatten(1, -2) for part in parts.values()), after]  # (B, n, N, C) -> (B, n*N, C)
        given = [x for x in tokens if x is not None]
        B, dtype = max(map(len, given), default=0), next(iter(self.pos_embed.values())).dtype
        if not given or any(x.ndim != 3 or x.shape[2] != self.embed_dim or len(x) not in (B, 1) for x in given):
            shapes = [tuple(x.shape) for x in given]
            raise ValueError(f'Cannot join tokens {shapes}: each must be (B or 1, N, {self.embed_dim}).')
        return torch.cat([x.expand(B, -1, -1).to(dtype) for x in given], dim=1)

    def run(
            self, tokens: torch.Tensor, start: int = 0, stop: int | None = None, bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Blocks `start` to `stop` - 1 of stage 3 on any tokens, (B, N, dim) -> (B, N, dim), without the norm.

        As `AttentionStage.forward_blocks`; raise ValueError if there are no such blocks.
        """
        return self._stage(start, stop).forward_blocks(tokens, 1, tokens.shape[1], start, stop, bias)

    def _stage(self, start: int, stop: int | None) -> Any:
        """Stage 3, which has the blocks `start` to `stop` - 1."""
        stage: Any = self.stages[-1]
        if not 0 <= start <= (len(stage.blocks) if stop is None else stop) <= len(stage.blocks):
            raise ValueError(f'There are no blocks {start} to {stop}: stage 3 has {len(stage.blocks)}.')
        return stage

    def attention(self, tokens: torch.Tensor, block: int, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Attention probabilities (B, num_heads, N, N) of a block for its tokens, float32 or longer; -1 = the last."""
        start = block if block >= 0 else block + len(self._stage(0, 0).blocks)
        layer = self._stage(start, start + 1).blocks[start]
        q, k, _ = layer.project(tokens).permute(2, 0, 3, 1, 4).unbind(0)  # each (B, num_heads, N, head_dim)
        with torch.autocast(tokens.device.type, enabled=False):
            return attention_weights(q, k, as_bias(bias, tokens.dtype), layer.score_scale)

    def split(self, tokens: torch.Tensor, parts: Parts, num_before: int = 0) -> dict[str, torch.Tensor]:
        """Maps of the images in a sequence, role -> (B, dim, h, w) or (B, n, dim, h, w).

        Args:
            tokens: (B, N, dim).
            parts: What was joined.
            num_before: Tokens in front of it.
        """
        maps = {}
        for role, part in parts.items():
            num = math.prod(part.shape[1:-1])
            x = tokens[:, num_before:num_before + num]  # of all samples, also if the part is one that they share
            x = x.reshape(tokens.shape[0], *part.shape[1:-2], *self._grid_size(role), self.embed_dim)
            maps[role] = x.movedim(-1, -3)  # (..., h, w, C) -> (..., C, h, w)
            num_before += num
        return maps

    def forward(
            self,
            inputs: Parts,
            before: torch.Tensor | None = None,
            after: torch.Tensor | None = None,
            types: Parts | None = None,
            bias: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """All tokens after the norm, (B, N, dim), and the maps of the images as by `split`.

        Args:
            inputs: Role -> images as for `embed`, or tokens that it gave; tokens have the order of this dict.
            before: Tokens to put in front, (B or 1, K, dim).
            after: Tokens to put behind, likewise.
            types: Role -> type embeddings, as for `embed`; also added to tokens that are given.
            bias: As for `AttentionStage.forward_blocks`; not with `migrate`.

        Raises:
            ValueError: A role is unknown, or an input is neither images of its size nor their tokens; or with
                `migrate` there is a bias, or not one image of the first role.
        """
        if unknown := [role for role in types or () if role not in inputs]:
            raise ValueError(f'types are given for {unknown[0]!r}, but the inputs are: {", ".join(inputs)}.')
        parts = {}
        for role, x in inputs.items():
            height, width = self._grid_size(role)
            shape = height * width, self.embed_dim
            is_kept = x.shape[-2:] == shape and (x.ndim == 3 or x.ndim == 4 and shape != (16 * height, 16 * width))
            x = x if is_kept else self.embed(x, role)
            parts[role] = add_types(x, types[role]) if types and role in types else x
        tokens = self.join(parts, before, after)
        num_before = 0 if before is None else before.shape[1]
        if self.leaving:
            tokens = self._run_migrating(tokens, parts, num_before, bias)
        else:
            tokens = self.run(tokens, bias=bias)
        tokens = self.norm(tokens)
        return tokens, self.split(tokens, parts, num_before)

    def _run_migrating(
            self, tokens: torch.Tensor, parts: Parts, first: int, bias: torch.Tensor | None) -> torch.Tensor:
        """As `run`, with fewer tokens of the first role from block to block; `first` is where the parts begin."""
        stage: Any = self.stages[-1]
        role = next(iter(self.grid_sizes))
        if bias is not None or role not in parts or parts[role].ndim != 3:
            raise ValueError(f'With migrate= one image of the role {role!r} is needed for each sample, and no bias.')
        for other in list(parts)[:list(parts).index(role)]:
            first += math.prod(parts[other].shape[1:-1])
        num, left = parts[role].shape[1], []
        positions = torch.arange(num, device=tokens.device).expand(len(tokens), 1, -1)
        for block, num_leave in zip(stage.blocks, self.leaving):
            args = block, tokens, first, positions, num_leave
            tokens, positions, out = checkpoint(_migrate, *args) if stage.grad_checkpointing else _migrate(*args)
            left.append(out)
        last = first + positions.shape[2]
        image = replenish(tokens[:, None, first:last], positions, left, num, carry=True)
        return torch.cat((tokens[:, :first], image, tokens[:, last:]), dim=1)

    def load(self, path: str | Path, prefix: str | None = None) -> StateDict:
        """Load a tracker's checkpoint, or a folder that `timm-itpn convert` made of one, without running its code.

        Args:
            path: The file or folder.
            prefix: Where in it the encoder is, such as 'encoder.body', needed only if there are several networks.

        Returns:
            The tensors that lie beside those of the encoder, by name: the tracker's own.

        Raises:
            ValueError: It lacks weights of the encoder, or has values that are not finite.
            RuntimeError: Shapes do not fit, or it has more blocks.
        """
        path, target = Path(path), self.state_dict()
        weights, _ = unwrap(read_contents(path / 'model.safetensors' if path.is_dir() else path).tree, prefix=prefix)
        weights = to_encoder(weights, self)
        besides = [key for key in weights if key not in target and not key.startswith('stages.')]
        own = {key.removeprefix(TRACKING): weights.pop(key) for key in besides}
        missing = [key for key in target if key not in weights]
        if wrong := f'it lacks {listed(missing)}' if missing else why_no_weights(weights):
            raise ValueError(f'{path} cannot be loaded: {wrong}. It has (for names=): {", ".join(own) or "nothing"}.')
        self.load_state_dict(weights)
        return own

    def official_state_dict(self) -> StateDict:
        """The weights in the authors' layout, by the names that `load` takes them from, for a tracker's own code."""
        return from_encoder(self)


def _migrate(
        block: Any, x: torch.Tensor, first: int, positions: torch.Tensor, num_leave: int,
) -> tuple[torch.Tensor, torch.Tensor, Left | None]:
    """A block: tokens without those that leave, positions (B, 1, M) of the image's in its grid, and those that left."""
    last, left = first + positions.shape[2], None
    qkv = block.project(x)
    x = block.attend(x, qkv.permute(2, 0, 3, 1, 4).unbind(0), None)
    if num_leave > 0:
        keys = qkv[:, None, first:last, 1].flatten(-2)  # (B, 1, M, dim)
        image, positions, left = depart(x[:, None, first:last], positions, keys, None, num_leave)
        x = torch.cat((x[:, :first], image[:, 0], x[:, last:]), dim=1)
    return block.feed(x), positions, left


def convert_on_load(encoder: JointEncoder, state_dict: StateDict, prefix: str, *_: Any) -> None:
    """Convert what lies under `prefix`: PyTorch calls this before the encoder, or its tracker, loads its weights."""
    weights = {key.removeprefix(prefix): state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
    state_dict.update({prefix + key: value for key, value in to_encoder(weights, encoder).items()})
