"""The picture of `timm-itpn show --tokens`: which tokens left at which block, over the photograph."""
from typing import Any, NamedTuple

__all__ = ['Departures', 'departures', 'draw']

STRIDE = 16  # pixels per token
PANEL_WIDTH = 3.2  # inches
COLOUR = 'tab:red'  # of tokens that leave now


class Departures(NamedTuple):
    """When tokens left.

    Attributes:
        block: int map (h, w): the block of stage 3 at which a token left, `depth` for those that stayed.
        depth: Blocks of stage 3.
        window: Map (h, w): index of the window of a token.
    """
    block: Any
    depth: int
    window: Any


def departures(model: Any, images: Any) -> Departures:
    """Run a model of this package with token migration on one image (1, 3, H, W).

    Raises:
        ValueError: No token leaves: the model does not migrate.
    """
    import torch

    from ..acceleration.stage import MigrationStage
    from ..acceleration.windows import window_positions

    stage = model.stages[2]
    places: list[Any] = []
    if isinstance(stage, MigrationStage):
        x = model.patch_embed(images)
        for earlier in model.stages[:2]:
            x = earlier(x)
        x, places = stage.run(x)
    if not any(each.shape[2] for each in places):
        raise ValueError('no token leaves, so there is nothing to draw: add --acceleration full')
    _, height, width, _ = x.shape
    block = torch.full((height * width,), len(places))
    for i, each in enumerate(places):
        block[each[0].flatten().cpu()] = i if each.shape[2] else len(places)
    index = window_positions(height, width, stage.gather_window, torch.device('cpu'))
    window = torch.empty(height * width + 1, dtype=torch.int64)
    window[index] = torch.arange(len(index))[:, None].expand(index.shape)
    return Departures(block.reshape(height, width), len(places), window[:-1].reshape(height, width))


def draw(shown: Any, left: Departures, caption: str) -> Any:
    """Draw the image with its windows, then for each block at which tokens leave: who is left, and who leaves.

    Args:
        shown: Image (H, W, 3) in 0..1.
        left: When tokens left.
        caption: What stands above all.

    Returns:
        The matplotlib figure.
    """
    import torch
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure

    height, width = shown.shape[:2]
    blocks = sorted({int(i) for i in left.block.flatten()} - {left.depth})
    columns = 2 + len(blocks)
    panel_height = PANEL_WIDTH * min(max(height / width, 0.4), 2.5)
    figure = Figure(figsize=(PANEL_WIDTH * columns, panel_height + 1.1), layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns)
    per_pixel = left.block.repeat_interleave(STRIDE, 0).repeat_interleave(STRIDE, 1)[:, :, None]  # (H, W, 1)
    for i, panel in enumerate(axes):
        if i == 0:
            pixels, title = shown, f'{int(left.window.max()) + 1} windows'
        elif i <= len(blocks):
            now, gone = per_pixel == blocks[i - 1], per_pixel < blocks[i - 1]
            pixels = torch.where(now, 0.35 * shown + 0.65 * torch.tensor(to_rgb(COLOUR)), shown)
            pixels = torch.where(gone, torch.ones(3), pixels)
            title = f'block {blocks[i - 1]}: {int((left.block == blocks[i - 1]).sum())} leave'
        else:
            pixels = torch.where(per_pixel < left.depth, torch.ones(3), shown)
            title = f'{int((left.block == left.depth).sum())} of {left.block.numel()} stay'
        panel.imshow(pixels.numpy(), extent=(0, width, height, 0))
        for y in range(1, len(left.window)):
            if left.window[y, 0] != left.window[y - 1, 0]:
                panel.axhline(y * STRIDE, color='white', linewidth=0.8)
        for x in range(1, left.window.shape[1]):
            if left.window[0, x] != left.window[0, x - 1]:
                panel.axvline(x * STRIDE, color='white', linewidth=0.8)
        panel.set_title(title, fontsize=10)
        panel.axis('off')
    figure.suptitle(
        f'{caption}\nred: tokens that leave, white: tokens that have left', parse_math=False, fontsize=11)
    return figure
