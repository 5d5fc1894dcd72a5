"""What is added to the tokens of an image: its positions, and what a token of a template stands for."""
import torch
import torch.nn.functional as F
from einops import rearrange

from ..layers.stages import resample_pos_embed

METHODS = ('half_pixel', 'corners', 'crop')


def role_pos_embed(
        pos_embed: torch.Tensor, new_size: tuple[int, int], old_size: tuple[int, int], method: str) -> torch.Tensor:
    """Make the embedding of another grid of (1, h*w, C), in one of the ways in which visual trackers make theirs.

    Args:
        pos_embed: Embedding of `old_size[0] * old_size[1]` positions, row-major.
        new_size: New grid (height, width), in tokens.
        old_size: Grid of `pos_embed`.
        method: 'half_pixel', as `resample_pos_embed`; 'corners', bicubic with aligned corners; 'crop', the upper left
            part of the grid, or 'corners' where a side is longer.

    Raises:
        ValueError: `method` is unknown.
    """
    if method not in METHODS:
        raise ValueError(f'positions {method!r} is unknown, use one of {METHODS}')
    if method == 'half_pixel' or new_size == old_size:
        return resample_pos_embed(pos_embed, list(new_size), list(old_size))
    grid = rearrange(pos_embed, '1 (h w) c -> 1 c h w', h=old_size[0])
    if method == 'crop' and new_size[0] <= old_size[0] and new_size[1] <= old_size[1]:
        grid = grid[:, :, :new_size[0], :new_size[1]]
    else:
        grid = F.interpolate(grid.float(), new_size, mode='bicubic', align_corners=True).to(pos_embed.dtype)
    return rearrange(grid, '1 c h w -> 1 (h w) c')


def add_types(tokens: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
    """Add types (dim,), (N, dim) or (..., N, dim) to tokens (..., N, dim); raise ValueError for other shapes."""
    fit = types.ndim in (1, 2, tokens.ndim) and types.shape[-2:] == tokens.shape[-min(types.ndim, 2):]
    if not fit or any(own not in (num, 1) for own, num in zip(types.shape[:-2], tokens.shape)):
        raise ValueError(f'types {tuple(types.shape)} do not fit tokens {tuple(tokens.shape)}: use (dim,) or (N, dim).')
    return tokens + types


def foreground_share(boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Share of each token's 16 x 16 pixels that are inside of a box, by their upper left corners.

    Args:
        boxes: (..., 4): left, top, width and height, as shares of the image's sides.
        height: Of the image, in pixels.
        width: Likewise.

    Returns:
        (..., N), 0 to 1, in raster order.
    """
    left, top, box_width, box_height = boxes.unbind(-1)
    rows, columns = _inside(top, box_height, height), _inside(left, box_width, width)
    return (rows[..., :, None] * columns[..., None, :]).flatten(-2)


def _inside(start: torch.Tensor, length: torch.Tensor, side: int) -> torch.Tensor:
    """Share of the pixels that are inside, for each row or column of tokens, (...) -> (..., side / 16)."""
    pixel, first = torch.arange(side, device=start.device), start[..., None] * side
    inside = (pixel >= first) & (pixel < first + length[..., None] * side)
    return inside.to(start.dtype).unflatten(-1, (-1, 16)).mean(-1)
