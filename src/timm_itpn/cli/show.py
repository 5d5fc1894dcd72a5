"""`timm-itpn show`: draw a model's features of an image, as colours from their principal components, or which tokens
leave; `show_figures.py` draws."""
import argparse
import sys
from pathlib import Path
from typing import Any

from ..checks import check_device, check_figure, check_new, check_regular_file
from ..files import save_figure
from .arguments import height_width

LONGEST_SIDE = 448  # of an image that is shown at its own size


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser('show', help="draw a model's features of an image")
    parser.add_argument('image', type=Path, metavar='IMAGE', help='any image file')
    parser.add_argument(
        '--model', default='fast_itpn_tiny_fpn',
        help='any model of this package; those named *_fpn have a pyramid (default: %(default)s)')
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument(
        '--checkpoint', type=Path, metavar='FILE', help='weights to load, in official or native layout')
    weights.add_argument('--pretrained', action='store_true', help='load the published weights')
    parser.add_argument(
        '--pyramid-init', choices=('pretrained', 'random'), default='pretrained',
        help='random: accept weights without a pyramid, and initialise it (default: %(default)s)')
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
    output = args.output or Path(f'{args.image.stem}_{"tokens" if args.tokens else "show"}.png')
    check_figure(output, '--output')
    if not args.force:
        check_new(output, '--output', 'overwrite it with --force')
    image = read_image(args.image)
    height, width = height_width(args.img_size) or own_size(*image.size)
    check_device(args.device)

    import torch
    from PIL.Image import Resampling
    from torchvision.transforms.functional import normalize, to_tensor

    from .show_figures import departures, draw_features, draw_tokens, feature_maps

    model, weights = build(args, (height, width))
    shown = to_tensor(image.resize((width, height), Resampling.BICUBIC))  # (3, H, W) in 0..1
    pixels = normalize(shown, model.pretrained_cfg['mean'], model.pretrained_cfg['std'])[None].to(args.device)
    shown = shown.permute(1, 2, 0)  # (3, H, W) -> (H, W, 3)
    caption = ', '.join(filter(None, (args.model, args.acceleration and f'acceleration {args.acceleration}', weights)))
    with torch.inference_mode():
        if args.tokens:
            figure = draw_tokens(shown, departures(model, pixels), model.stages[2].gather_window, caption)
        else:
            figure = draw_features(shown, feature_maps(model, pixels), caption)
    save_figure(figure, output)
    if weights.startswith('random'):
        print(f'{args.model} has {weights}: load trained ones with --pretrained or --checkpoint', file=sys.stderr)
    print(output)


def read_image(path: Path) -> Any:
    """A PIL image of a file as it is meant to be seen: upright, in colour."""
    from PIL import Image, ImageOps

    from ..engine.data import to_rgb

    check_regular_file(path)
    try:
        with Image.open(path) as file:
            return to_rgb(ImageOps.exif_transpose(file))
    except Exception as error:  # whatever a file makes one of Pillow's many readers do
        raise ValueError(f'{path} cannot be read as an image: {error or type(error).__name__}') from error


def own_size(width: int, height: int) -> tuple[int, int]:
    """Height and width for an image of this size: multiples of 16, at most `LONGEST_SIDE`."""
    scale = min(1., LONGEST_SIDE / max(width, height))
    rows, columns = (max(1, round(side * scale / 16)) for side in (height, width))
    return 16 * rows, 16 * columns


def build(args: argparse.Namespace, img_size: tuple[int, int]) -> tuple[Any, str]:
    """Create the model; return it, and where its weights are from, in words."""
    import timm
    from timm.utils import random_seed

    from ..models import check_name  # its package registers the models even where TIMM_ITPN_AUTOLOAD=0

    check_name(args.model)
    overlay: dict[str, Any] = {'num_classes': 0}  # as the model's, so that timm loads strictly
    loads = args.pretrained or args.checkpoint is not None
    weights = 'published weights' if loads else f'random weights (seed {args.seed})'
    if args.checkpoint:
        weights, overlay['file'] = f'weights of {args.checkpoint.name}', str(args.checkpoint)
    if loads and args.pyramid_init == 'random':
        weights += ', pyramid random if it has none'
    random_seed(args.seed)
    model = timm.create_model(
        args.model,
        pretrained=loads,
        pretrained_cfg_overlay=overlay,
        num_classes=0,
        img_size=img_size,
        pyramid=args.model.partition('.')[0].endswith('_fpn'),
        pyramid_init=args.pyramid_init,
        acceleration=args.acceleration,
        gather_window=args.gather_window,
    )
    return model.to(args.device).eval(), weights
