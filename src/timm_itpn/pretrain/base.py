"""What the objectives have in common: their interface, and the layers that bring the levels of a pyramid to tokens."""
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from einops import rearrange
from timm.layers import LayerNorm
from timm.models.vision_transformer import init_weights_vit_timm

from ..engine.task import Losses
from ..models.itpn import ITPN as Student

STEM_SIDE = 4  # stem positions along a side of a patch


class Objective(nn.Module):
    """A student with the layers that predict. `forward` gives the loss.

    Args:
        student: Backbone with pyramid, without classifier.
        num_masked: Tokens that are masked in every image.
    """
    NAME = ''  # key of `OBJECTIVES`
    TEACHER = False  # needs tokens of a teacher
    MASKING = 'block'  # key of `MASKINGS`, the paper's choice
    MASK_RATIO = 75 / 196  # share of the tokens that are masked, the paper's choice
    STUDENT: dict[str, dict[str, Any]] = {}  # arguments of the student, by its family
    decoder_embed: nn.Module  # brings the levels of the pyramid to tokens, see `LevelsToTokens`

    def __init__(self, student: Student, num_masked: int):
        super().__init__()
        if student.family not in self.STUDENT:
            raise ValueError(
                f'The objective {self.NAME} is for {" and ".join(self.STUDENT)} models, not for {student.family}: '
                'choose another --model or --objective.')
        if student.pyramid is None:
            raise ValueError('The student has no feature pyramid: create it with pyramid=True.')
        if student.pyramid.concat:
            raise ValueError('The student has pyramid_concat=True: create it without.')
        if student.dynamic_img_size:
            raise ValueError('The student has dynamic_img_size=True: pre-training is at one size.')
        self.backbone: Any = student
        self.num_masked = num_masked
        self.grid_size = student.patch_embed.grid_size

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay, for timm's optimizer factory."""
        tables = {name for name, _ in self.named_parameters() if name.endswith('relative_position_bias_table')}
        return tables | {f'backbone.{name}' for name in self.backbone.no_weight_decay()}

    def after_update(self, progress: float) -> None:
        """Called after each update of the weights.

        Args:
            progress: Share of all updates that are done, 0..1.
        """

    def tokens_of_levels(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        """Maps of the three stages -> tokens of each level of the pyramid, coarse first."""
        return self.decoder_embed(self.backbone.pyramid(maps, [0, 1, 2]))

    def mean_of_masked(self, values: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        """Mean over the masked tokens of (B, N)."""
        return (values * masked.flatten(1)).sum() / (len(values) * self.num_masked)

    def predict(self, images: torch.Tensor, masked: torch.Tensor) -> Any:
        """What the objective predicts of all tokens; arguments as in `forward`."""
        raise NotImplementedError

    def forward(self, images: torch.Tensor, masked: torch.Tensor, target: torch.Tensor | None = None) -> Losses:
        """Compute the loss.

        Args:
            images: (B, 3, H, W), normalised for the student.
            masked: (B, H / 16, W / 16), True = hidden from the student, `num_masked` in every image.
            target: Teacher's tokens (B, H * W / 256, teacher_dim), if there is one.

        Returns:
            'loss', and its terms if it has several: scalars, float32.
        """
        raise NotImplementedError


class LevelsToTokens(nn.ModuleList):
    """Brings each level of a pyramid to one vector per token: a norm, then a layer over the positions of the token.

    Index 0, 1, 2 is for strides 16, 8, 4, as in the official files.

    Args:
        dim: Channels of the levels.
        out_dim: Width of the tokens, with Linear layers a multiple of 16.
        conv: The layer is a convolution over all positions (Fast-iTPN); else a Linear layer for each position, whose
            outputs are concatenated (iTPN).
    """

    def __init__(self, dim: int, out_dim: int, conv: bool = False):
        super().__init__()
        for side in (1, 2, 4):  # positions of a level along a side of a token
            layer = nn.Conv2d(dim, out_dim, side, side) if conv else nn.Linear(dim, out_dim // side ** 2)
            self.append(nn.Sequential(LayerNorm(dim), layer))

    def forward(self, levels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Maps (B, H, W, dim) of the levels, from fine to coarse -> (B, h * w, out_dim) for each, coarse first."""
        tokens = []
        for i, (branch, level) in enumerate(zip(self, levels[::-1])):
            assert isinstance(branch, nn.Sequential)
            norm, layer = branch
            x = norm(level)
            if isinstance(layer, nn.Conv2d):
                tokens.append(layer(x.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2))  # (B, D, h, w) -> (B, h*w, D)
            else:
                tokens.append(rearrange(layer(x), 'b (h y) (w x) c -> b (h w) (y x c)', y=2 ** i, x=2 ** i))
        return tokens


def init_linear(modules: Iterable[nn.Module]) -> None:
    """Initialise Linear layers as timm's ViT does: trunc normal of 0.02, biases zero."""
    for module in modules:
        module.apply(partial(init_weights_vit_timm, needs_reset=False))
