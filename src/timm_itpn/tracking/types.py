"""What a token of a template stands for: the target, or what is around it."""
import torch

__all__ = ['foreground_share']


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
