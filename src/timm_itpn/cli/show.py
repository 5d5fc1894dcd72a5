"""`timm-itpn show`: draw what a model makes of an image: its features, as colours from their principal components, or
which tokens leave (`tokens_figure.py`)."""
import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any, NamedTuple

from . import tokens_figure

REQUIRES = ('matplotlib',)
LONGEST_SIDE = 448  # of an image that is shown at its own size
PANEL_WIDTH = 2.2  # inches


class FeatureMap(NamedTuple):
    name: str
    stride: int
    values: Any  # tensor (H, W, C)


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser('show', help="draw a model's features of an image")
    parser.add_argument('image', type=Path, metavar='IMAGE', help='any image file')
    parser.add_argument(
        '--model', default='fast_itpn_tiny_fpn',
        help='any model of this package, those named *_fpn have a pyramid (default: %(default)s)')
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument(
        '--checkpoint', type=Path, metavar='FILE', help='weights to load, in official or native layout')
    weights.add_argument('--pretrained', action='store_true', help='load the published weights')
    parser.add_argument(
        '--pyramid-init', choices=('pretrained', 'random'), default='pretrained',
        help='random: take weights that have no pyramid too, it then starts new (default: %(default)s)')
    parser.add_argument(
        '--acceleration', choices=('light', 'full'), help='run the model with token gathering and migration')
    parser.add_argument(
        '--gather-window', type=int, metavar='N', help='side of its windows in tokens (default: of the acceleration)')
    parser.add_argument(
        '--tokens', action='store_true', help='draw which tokens leave at which block, in place of the features')
    parser.add_argument(
        '--img-size', type=int, nargs='+', metavar=('H', 'W'),
        help='height and width, or the side of a square, multiples of 16 '
             f"(default: the image's own, with the longer side at most {LONGEST_SIDE})")
    parser.add_argument(
        '--output', type=Path, metavar='PNG',
        help='picture to write (default: IMAGE_show.png or IMAGE_tokens.png, here)')
    parser.add_argument('--force', action='store_true', help='overwrite the output')
    parser.add_argument('--device', default='cpu', help='PyTorch device (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='of random weights (default: %(default)s)')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    missing = [name for name in REQUIRES if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeError(f"show needs {', '.join(missing)}: pip install 'timm-itpn[demo]'")
    output = args.output or Path(f'{args.image.stem}_{"tokens" if args.tokens else "show"}.png')
    check_output(output, args.force)
    image = read_image(args.image)
    img_size = image_size(args.img_size, image.size)
    check_device(args.device)

    import torch

    model, weights = build(args, img_size)
    pixels, shown = prepare(image, model, img_size)
    pixels = pixels.to(args.device)
    acceleration = f', acceleration {args.acceleration}' if args.acceleration else ''
    caption = f'{args.model}{acceleration}, {weights}'
    with torch.inference_mode():
        if args.tokens:
            figure = tokens_figure.draw(shown, tokens_figure.departures(model, pixels), caption)
        else:
            figure = draw(shown, feature_maps(model, pixels), caption)
    save(figure, output)
    print(output)


def check_output(output: Path, force: bool) -> None:
    if output.suffix.lower() != '.png':
        raise ValueError(f'{output} is no name of a PNG file: let --output end in .png')
    if not output.parent.is_dir():
        raise ValueError(f'{output} cannot be written: there is no folder {output.parent}')
    if output.exists() and not force:
        raise ValueError(f'{output} exists already: name another file with --output, or overwrite it with --force')


def check_device(device: str) -> None:
    import torch

    try:
        torch.zeros(1, device=device)
    except (AssertionError, RuntimeError) as error:  # AssertionError: this build of torch is without the device
        raise RuntimeError(f'device {device!r} cannot be used: {str(error).partition(". ")[0]}') from error


def read_image(path: Path) -> Any:
    """Return an image file as it is meant to be seen: upright, in colour."""
    from PIL import Image, ImageOps

    if not path.exists():
        raise ValueError(f'{path} does not exist')
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith('I'):  # 16 bits: convert('RGB') would make white of all above 255
                image = image.convert('F').point(lambda value: value / 257).convert('L')
            return image.convert('RGB')
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # SyntaxError: broken PNG files
        raise ValueError(f'{path} cannot be read as an image: {error}') from error


def image_size(asked: list[int] | None, own: tuple[int, int]) -> tuple[int, int]:
    """Height and width for the model.

    Args:
        asked: Height and width, or one side; None for the image's own size, to multiples of 16.
        own: Width and height of the image.
    """
    if asked is None:
        scale = min(1., LONGEST_SIDE / max(own))
        width, height = (max(1, round(side * scale / 16)) * 16 for side in own)
        return height, width
    return square_or_pair(asked)


def square_or_pair(sides: list[int]) -> tuple[int, int]:
    """Height and width from the numbers of --img-size."""
    if len(sides) > 2:
        raise ValueError(f'--img-size takes one or two numbers, not {len(sides)}')
    return sides[0], sides[-1]


def build(args: argparse.Namespace, img_size: tuple[int, int]) -> tuple[Any, str]:
    """Create the model; return it, and where its weights are from in words."""
    import timm
    from timm.models import split_model_name_tag
    from timm.utils import random_seed

    from ..models.names import check_name  # registers them even where TIMM_ITPN_AUTOLOAD=0

    check_name(args.model)
    name, _ = split_model_name_tag(args.model)
    overlay: dict[str, Any] = {'num_classes': 0}  # as the model's, so that timm loads strictly
    loads = args.pretrained or args.checkpoint is not None
    if args.checkpoint is not None:
        overlay['file'] = str(args.checkpoint)
    if loads:
        weights = 'published weights' if args.pretrained else f'weights of {args.checkpoint.name}'
        if args.pyramid_init == 'random':
            weights += ', pyramid random if it has none'
    else:
        weights = f'random weights (seed {args.seed})'
        print(f'{args.model} has {weights}: load trained ones with --pretrained or --checkpoint', file=sys.stderr)
    random_seed(args.seed)
    model = timm.create_model(
        args.model,
        pretrained=loads,
        pretrained_cfg_overlay=overlay,
        num_classes=0,
        img_size=img_size,
        pyramid=name.endswith('_fpn'),
        pyramid_init=args.pyramid_init,
        acceleration=args.acceleration,
        gather_window=args.gather_window,
    )
    return model.to(args.device).eval(), weights


def prepare(image: Any, model: Any, img_size: tuple[int, int]) -> tuple[Any, Any]:
    """Resize the whole image as timm's data config of the model says.

    Returns:
        The model's input (1, 3, H, W), and the same pixels to look at, (H, W, 3) in 0..1.
    """
    import torch
    from timm.data import create_transform, resolve_data_config

    config = resolve_data_config(
        {'input_size': (3, *img_size), 'crop_pct': 1.0, 'crop_mode': 'squash'}, model=model)
    pixels = create_transform(**config)(image)
    shown = pixels.permute(1, 2, 0) * torch.tensor(config['std']) + torch.tensor(config['mean'])  # (H, W, 3)
    return pixels[None], shown.clamp(0, 1)


def feature_maps(model: Any, images: Any) -> list[FeatureMap]:
    """Maps of all stages and, if the model has a pyramid, of all its levels, for one image (1, 3, H, W)."""
    x = model.patch_embed(images)
    stages = []
    for stage in model.stages:
        x = stage(x)
        stages.append(x)
    levels = [] if model.pyramid is None else model.pyramid(stages, indices=list(range(5)))
    maps = [FeatureMap(f'stage {i + 1}', 4 * 2 ** i, stage[0]) for i, stage in enumerate(stages)]
    maps += [FeatureMap(f'pyramid level {i + 1}', 4 * 2 ** i, level[0]) for i, level in enumerate(levels)]
    return maps


def principal_components(features: Any, num_components: int = 3) -> Any:
    """Project features on the directions in which they vary most.

    Args:
        features: Map (H, W, C) of any type, on any device.
        num_components: Directions, at most C.

    Returns:
        float64 map (H, W, num_components) on the CPU, with mean 0. What is below the precision of `features` is 0.

    Raises:
        ValueError: A feature is not finite.
    """
    import torch

    x = features.detach().cpu().double()
    if not x.isfinite().all():
        raise ValueError('the features are not finite: the weights are broken')
    noise = 10 * torch.finfo(features.dtype).eps * x.abs().max()
    centred = (x - x.mean(dim=(0, 1))).flatten(0, 1)  # (H, W, C) -> (H*W, C)
    _, directions = torch.linalg.eigh(centred.T @ centred)
    directions = directions[:, -num_components:].flip(1)  # from the smallest variance first to the largest first
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    directions = directions * largest.sign()  # an eigenvector's sign is arbitrary: its largest entry is made positive
    components = centred @ directions
    components = components * (components.std(dim=0, correction=0) > noise)
    return components.reshape(*x.shape[:2], -1)


def to_colours(components: Any, tail: float = 0.01) -> Any:
    """Scale each component (H, W, 3) to 0..1 between its outliers, a fraction `tail` on each side; 0.5 if constant."""
    import torch

    low, high = torch.quantile(components.flatten(0, 1), torch.tensor([tail, 1 - tail]).to(components), dim=0)
    span = high - low
    return torch.where(span > 0, ((components - low) / span).clamp(0, 1), 0.5)


def draw(shown: Any, maps: list[FeatureMap], caption: str) -> Any:
    """Draw stages and image, and below them the levels, each under the stage of the same stride.

    Args:
        shown: Image (H, W, 3) in 0..1.
        maps: Three stages, then levels if there are any.
        caption: What stands above all.

    Returns:
        The matplotlib figure.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height, width = shown.shape[:2]
    stages, levels = maps[:3], maps[3:]
    rows, columns = (2, 5) if levels else (1, 4)
    panel_height = PANEL_WIDTH * min(max(height / width, 0.4), 2.5)
    figure = Figure(figsize=(PANEL_WIDTH * columns, rows * (panel_height + 0.45) + 0.6), layout='constrained')
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(rows, 2 * columns)  # a panel takes two, so that one can stand amid two others
    for i, stage in enumerate(stages):
        draw_map(figure.add_subplot(grid[0, 2 * i:2 * i + 2]), stage, height, width)
    axes = figure.add_subplot(grid[0, columns + 2:columns + 4])  # in the middle of what the three stages leave
    axes.imshow(shown.numpy())
    axes.set_title(f'image\n{height} x {width} pixels', fontsize=10)
    axes.axis('off')
    for i, level in enumerate(levels):
        draw_map(figure.add_subplot(grid[1, 2 * i:2 * i + 2]), level, height, width)
    figure.suptitle(
        f'{caption}\ncolours: the first three principal components of each map', parse_math=False, fontsize=11)
    return figure


def draw_map(axes: Any, feature_map: FeatureMap, height: int, width: int) -> None:
    name, stride, values = feature_map
    rows, columns, channels = values.shape
    axes.imshow(
        to_colours(principal_components(values)).numpy(),
        interpolation='nearest',
        extent=(0, columns * stride, rows * stride, 0),  # in pixels: the last coarse cells may reach out of the image
    )
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_title(f'{name}, stride {stride}\n{rows} x {columns}, {channels} channels', fontsize=10)
    axes.axis('off')


def save(figure: Any, output: Path) -> None:
    """Write a figure as PNG, all or nothing."""
    from ..files import replaced

    with replaced(output) as part:
        figure.savefig(part, dpi=120, format='png', bbox_inches='tight')
