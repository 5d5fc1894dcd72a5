"""Which tokens of an image are masked; drawn on the CPU."""
import math
from collections.abc import Callable

import torch

__all__ = ['MASKINGS', 'block_masking', 'random_masking']

MIN_BLOCK = 16  # tokens of a block
MIN_ASPECT = 0.3  # of a block, height by width or width by height
MAX_TRIES = 10  # of one block


def random_masking(grid_size: tuple[int, int], num_masked: int, generator: torch.Generator) -> torch.Tensor:
    """Mask random tokens; arguments and result as of `block_masking`."""
    height, width = grid_size
    masked = torch.zeros(height * width, dtype=torch.bool)
    masked[torch.randperm(height * width, generator=generator)[:num_masked]] = True
    return masked.reshape(height, width)


def block_masking(grid_size: tuple[int, int], num_masked: int, generator: torch.Generator) -> torch.Tensor:
    """Mask rectangles of at least 16 tokens, of aspect 0.3 to 1 / 0.3, until there are enough.

    Rectangles may overlap. Single random tokens make up the number where no further rectangle fits, so it is exact.

    Args:
        grid_size: Tokens (height, width).
        num_masked: How many.
        generator: Of everything random.

    Returns:
        (height, width), bool, True where masked.
    """
    height, width = grid_size
    masked = torch.zeros(height, width, dtype=torch.bool)
    left = num_masked
    while left > 0 and (added := _add_block(masked, left, generator)):
        left -= added
    if left > 0:
        free = (~masked).flatten().nonzero()[:, 0]
        masked.view(-1)[free[torch.randperm(len(free), generator=generator)[:left]]] = True
    return masked


def _add_block(masked: torch.Tensor, left: int, generator: torch.Generator) -> int:
    """Mask one rectangle with at most `left` tokens that are not masked yet; return their number."""
    height, width = masked.shape
    for _ in range(MAX_TRIES):
        draws = torch.rand(4, generator=generator).tolist()
        area = MIN_BLOCK + draws[0] * max(0, left - MIN_BLOCK)
        aspect = math.exp((2 * draws[1] - 1) * -math.log(MIN_ASPECT))
        rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < rows <= height and 0 < columns <= width):
            continue
        top, start = int(draws[2] * (height - rows + 1)), int(draws[3] * (width - columns + 1))
        block = masked[top:top + rows, start:start + columns]
        added = rows * columns - int(block.sum())
        if 0 < added <= left:
            block.fill_(True)
            return added
    return 0


MASKINGS: dict[str, Callable] = {'block': block_masking, 'random': random_masking}
