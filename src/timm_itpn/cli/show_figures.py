"""The figures of `timm-itpn show`: features as colours, or which tokens leave at which block."""
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch import Tensor

from ..acceleration.migration import Left
from ..acceleration.stage import MigrationStage
from ..acceleration.windows import window_positions
from ..layers.stages import stage_maps

STRIDE = 16  # pixels per token of stage 3
FEATURE_WIDTH, TOKEN_WIDTH = 2.2, 3.2  # of a panel, inches
LEAVING = torch.tensor(to_rgb('tab:red'))


def feature_maps(model: Any, images: Tensor) -> dict[str, Tensor]:
    """Maps (H, W, C) of all stages and, if the model has a pyramid, of its levels, for one image (1, 3, H, W)."""
    stages = stage_maps(model.stages, model.patch_embed(images))
    maps = {f'stage {i}': stage[0] for i, stage in enumerate(stages, 1)}
    if model.pyramid is not None:
        levels = model.pyramid(stages, indices=list(range(5)))
        maps.update({f'pyramid level {i}': level[0] for i, level in enumerate(levels, 1)})
    return maps


def colours(features: Tensor, tail: float = 0.01) -> Tensor:
    """The first three principal components of a map (H, W, C) as colours (H, W, 3) in 0..1.

    Each component goes from 0 to 1 between its outliers, a fraction `tail` on each side; one that varies by less than
    the precision of `features` is 0.5.
    """
    x = features.detach().cpu().double().flatten(0, 1)  # (H, W, C) -> (H*W, C)
    noise = 10 * torch.finfo(features.dtype).eps * x.abs().max()
    x = x - x.mean(dim=0)
    _, directions = torch.linalg.eigh(x.T @ x)  # the largest last
    components = x @ directions[:, -3:].flip(1)
    low, high = torch.quantile(components, torch.tensor([tail, 1 - tail], dtype=x.dtype), dim=0)
    scaled = torch.where(high - low > noise, ((components - low) / (high - low)).clamp(0, 1), 0.5)
    return scaled.reshape(*features.shape[:2], 3)


def draw_features(image: Tensor, maps: dict[str, Tensor], caption: str) -> Figure:
    """Draw stages and image, and below them the levels, each under the stage of the same stride.

    Args:
        image: Image (H, W, 3) in 0..1.
        maps: By name, three stages, then levels if there are any; strides double from 4 on.
        caption: Title of the figure.
    """
    height, width = image.shape[:2]
    layout = 'ABCI' if len(maps) == 3 else 'AABBCC.II.\nDDEEFFGGHH'
    columns, rows = (4, 1) if len(maps) == 3 else (5, 2)
    caption += '\ncolours: the first three principal components of each map'
    figure = _figure(columns, rows, FEATURE_WIDTH, height / width, caption)
    panels = figure.subplot_mosaic(layout)
    _panel(panels.pop('I'), image, f'image\n{height} x {width} pixels', height, width)
    for i, (panel, (name, features)) in enumerate(zip(panels.values(), maps.items())):
        stride = 4 * 2 ** (i if i < 3 else i - 3)
        grid = f'{features.shape[0]} x {features.shape[1]}, {features.shape[2]} channels'
        # the last cells of a coarse level may reach out of the image
        _panel(panel, colours(features), f'{name}, stride {stride}\n{grid}', height, width, stride)
    return figure


def departures(model: Any, images: Tensor) -> dict[int, Left]:
    """The tokens that leave when a model runs on one image (1, 3, H, W), by the number of the block of stage 3.

    Raises:
        ValueError: No token leaves: the model does not migrate.
    """
    stage = model.stages[2]
    left: list[Left | None] = []
    if isinstance(stage, MigrationStage):
        _, left = stage.run(model.stages[1](model.stages[0](model.patch_embed(images))))
    if not any(left):
        raise ValueError('no token leaves, so there is nothing to draw: add --acceleration full')
    return {block: group for block, group in enumerate(left) if group is not None}


def draw_tokens(image: Tensor, left: dict[int, Left], gather_window: int, caption: str) -> Figure:
    """Draw the image with its windows, then for each block at which tokens leave: who is left, who leaves, partners.

    Args:
        image: Image (H, W, 3) in 0..1.
        left: Of `departures`.
        gather_window: Largest side of a window, in tokens; 0 for one window.
        caption: Title of the figure.
    """
    height, width = image.shape[:2]
    columns = width // STRIDE
    windows = window_positions(height // STRIDE, columns, gather_window, torch.device('cpu'))[:, 0]  # first tokens
    gone = torch.zeros(height // STRIDE, columns, dtype=torch.bool)
    pictures = {f'{len(windows)} windows': image}
    for block, group in left.items():
        leaving = torch.zeros_like(gone)
        leaving.view(-1)[group.positions.flatten().cpu()] = True
        picture = torch.where(_per_pixel(leaving), 0.35 * image + 0.65 * LEAVING, image)
        pictures[f'block {block}: {int(leaving.sum())} leave'] = picture.masked_fill(_per_pixel(gone), 1.)
        gone |= leaving
    pictures[f'{int((~gone).sum())} of {gone.numel()} stay'] = image.masked_fill(_per_pixel(gone), 1.)

    caption += '\nred: tokens that leave, each with a line to its partner; white: tokens that have left'
    figure = _figure(len(pictures), 1, TOKEN_WIDTH, height / width, caption)
    panels = figure.subplots(1, len(pictures))
    for panel, (title, picture) in zip(panels, pictures.items()):
        _panel(panel, picture, title, height, width)
        for first in windows.tolist():
            panel.axhline(STRIDE * (first // columns), color='white', linewidth=0.8)
            panel.axvline(STRIDE * (first % columns), color='white', linewidth=0.8)
    for panel, group in zip(panels[1:], left.values()):
        ends = torch.stack((group.positions.flatten(), group.partner_positions.flatten())).cpu()  # (2, leaving)
        x, y = (STRIDE * (0.5 + value).numpy() for value in (ends % columns, ends // columns))
        panel.plot(x, y, color='gold', linewidth=0.8)
    return figure


def _per_pixel(tokens: Tensor) -> Tensor:
    """One value per token (h, w) -> one per pixel (H, W, 1)."""
    return tokens.repeat_interleave(STRIDE, 0).repeat_interleave(STRIDE, 1)[:, :, None]


def _figure(columns: int, rows: int, panel_width: float, ratio: float, title: str) -> Figure:
    """A figure for panels of the shape of an image, height by width `ratio`."""
    panel_height = panel_width * min(max(ratio, 0.4), 2.5) + 0.45
    figure = Figure(figsize=(panel_width * columns, rows * panel_height + 0.6), layout='constrained')
    figure.suptitle(title, parse_math=False, fontsize=11)
    return figure


def _panel(axes: Axes, picture: Tensor, title: str, height: int, width: int, stride: int = 1) -> None:
    """Draw a picture (h, w, 3), each of whose cells is `stride` pixels, as large as an image of height x width."""
    rows, columns, _ = picture.shape
    axes.imshow(picture.numpy(), interpolation='nearest', extent=(0, columns * stride, rows * stride, 0))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_title(title, fontsize=10)
    axes.axis('off')
