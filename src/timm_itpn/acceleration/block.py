"""The block of stage 3 with token gathering and migration, for training and for inference."""

import torch
import torch.nn as nn

from ..layers.blocks import AttentionBlock
from ..layers.fused import FusedAttentionBlock
from .gathering import attention_bias, global_heads, key_places, query_places, window_heads, window_mean
from .migration import select, similarity, take

__all__ = ['MigrationBlock']


def keys_of(x: torch.Tensor, qkv: torch.Tensor) -> torch.Tensor:
    """What tokens are compared by: their attention keys, of all heads together.

    Args:
        x: Tokens after attention (B, W, K, C).
        qkv: Their queries, keys and values (B, W, K, 3, num_heads, head_dim).

    Returns:
        (B, W, K, num_heads * head_dim).
    """
    return qkv[:, :, :, 1].flatten(-2)


class Migration(nn.Module):
    """What the block does with its tokens; who inherits from it brings the layers.

    Attributes:
        windowed: Attention is in windows; False = among all tokens.
        features: What tokens are compared by, see `keys_of`.
    """
    windowed: bool

    def forward(
            self,
            x: torch.Tensor,
            places: torch.Tensor,
            gathering: torch.Tensor | None,
            height: int,
            width: int,
            padded: bool,
            num_leave: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Attention, then tokens leave, then the MLP of those that stay.

        Args:
            x: Tokens (B, W, G + K, C): in each of W windows G gathering tokens (0 or 1), then K tokens.
            places: Their places on the grid (1 or B, W, K), row-major, height * width where padded.
            gathering: Bias of the gathering tokens (W, W); None = windows see nothing of each other.
            height: Of the grid, in tokens.
            width: Of the grid, in tokens.
            padded: There are padded places.
            num_leave: Tokens of each window that leave.

        Returns:
            Tokens and places as they came, without those that left; these (B, W, num_leave, C), and their places.
        """
        x, qkv = self.mix(x, places, gathering, height, width, padded)
        left, left_places = x[:, :, :0], places[:, :, :0]
        if num_leave > 0:
            G = x.shape[2] - places.shape[2]
            tokens = x[:, :, G:]
            places = places.expand(x.shape[0], -1, -1)
            with torch.no_grad():
                real = places < height * width if padded else None
                nearest = similarity(self.features(tokens, qkv[:, :, G:]), real)
                stay, leave = select(nearest, places.shape[2], num_leave)
            left, left_places = take(tokens, leave), places.gather(2, leave)
            x, places = torch.cat((x[:, :, :G], take(tokens, stay)), dim=2), places.gather(2, stay)
        return self.feed(x), places, left.clone(), left_places  # no view: FSDP2 warns of those

    def mix(
            self,
            x: torch.Tensor,
            places: torch.Tensor,
            gathering: torch.Tensor | None,
            height: int,
            width: int,
            padded: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention, with its residual sum.

        Args:
            x: As in `forward`, and so the others.

        Returns:
            The tokens (B, W, G + K, C), and the queries, keys and values (B, W, G + K, 3, num_heads, head_dim).
        """
        B, N = x.shape[0], height * width
        G = x.shape[2] - places.shape[2]
        qkv = self.project(x)
        if self.windowed:
            gathered: torch.Tensor | None = None
            if gathering is not None and G > 0:
                gathered = qkv[:, :, 0, 1:]
            elif gathering is not None:
                gathered = window_mean(qkv[:, :, :, 1:], places < N if padded else None)
            q, k, v = window_heads(qkv, G, gathered)
        else:
            q, k, v = global_heads(qkv, G)
        bias = attention_bias(places, N, gathering, padded, self.windowed)
        if self.rel_pos_bias is not None:
            rel_pos_bias = self.rel_pos_bias.between(
                query_places(places, N, G, self.windowed),
                key_places(places, N, gathering is not None, self.windowed),
                height,
                width,
            )
            bias = rel_pos_bias if bias is None else rel_pos_bias + bias
        if bias is not None:
            bias = bias.type_as(q).expand(B, -1, -1, -1, -1).flatten(0, 1)
        return self.attend(x, q, k, v, bias), qkv


class MigrationBlock(Migration, AttentionBlock):
    """`AttentionBlock` with token gathering and migration; it has the same parameters.

    Args:
        args: As for `AttentionBlock`.
        kwargs: As for `AttentionBlock`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.windowed = False  # the stage decides
        self.features = keys_of

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (..., dim) -> queries, keys and values (..., 3, num_heads, head_dim)."""
        return self.attn.project(self.norm1(x))

    def attend(
            self,
            x: torch.Tensor,
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """Add to the tokens what attention makes of queries, keys and values."""
        return x + self.drop_path1(self.ls1(self.attn.attend(q, k, v, bias).reshape(x.shape)))

    def feed(self, x: torch.Tensor) -> torch.Tensor:
        """Add to the tokens what the MLP makes of them."""
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    @torch.jit.ignore
    def fuse(self) -> nn.Module:
        """The block for inference."""
        return FusedMigrationBlock(self)


class FusedMigrationBlock(Migration, FusedAttentionBlock):
    """`MigrationBlock` for inference."""

    def __init__(self, block: MigrationBlock):
        super().__init__(block)
        self.windowed = block.windowed
        self.features = block.features
