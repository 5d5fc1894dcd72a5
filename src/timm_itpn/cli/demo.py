"""`timm-itpn demo`: train a Fast-iTPN on scikit-learn's digits with timm's tools, validate it, draw the result."""
import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..checks import check_device, require
from ..engine.arguments import number, positive
from ..files import created, save_figure

NUM_CLASSES = 10
NUM_TRAINING = 1437  # images; the others are held out
NUM_IMAGES = 24  # in the picture

History = list[tuple[float, float]]  # of each epoch: training loss, held-out top-1 accuracy in percent


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        'demo', help='train a model on handwritten digits', formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--output', type=Path, default=Path('output/demo'), help='new folder for everything written')
    parser.add_argument('--model', default='fast_itpn_tiny', help='any model of this package')
    parser.add_argument('--pretrained', action='store_true', help='start from the published weights')
    parser.add_argument('--img-size', type=int, default=32, help='side of the images in pixels, a multiple of 16')
    parser.add_argument('--epochs', type=positive, default=5, help=f'passes over the {NUM_TRAINING:,} training images')
    parser.add_argument('--batch-size', type=number(1, NUM_TRAINING, int), default=64, help='images per update')
    parser.add_argument('--lr', type=float, default=5e-4, help='peak learning rate')
    parser.add_argument('--device', default='cpu', help='PyTorch device')
    parser.add_argument('--seed', type=int, default=0, help='of weights, order and augmentation')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    require('the demo', 'demo', 'sklearn', 'matplotlib', 'tqdm')
    check_device(args.device)

    import timm
    import torch
    from timm.data import create_dataset, create_loader, resolve_data_config
    from timm.utils import random_seed

    from ..models import check_name

    check_name(args.model)
    with created(args.output, '--output') as folder:
        random_seed(args.seed)
        size = args.img_size
        model = timm.create_model(
            args.model, pretrained=args.pretrained, img_size=size, num_classes=NUM_CLASSES, drop_path_rate=0.1)
        model.to(args.device)
        write_digits(folder / 'data')
        config = resolve_data_config({'input_size': (3, size, size), 'crop_pct': 1.0}, model=model)
        options: dict[str, Any] = dict(
            config, batch_size=args.batch_size, num_workers=0, persistent_workers=False, use_prefetcher=False,
            device=torch.device(args.device))
        train_set, val_set = (create_dataset('', root=str(folder / 'data'), split=split) for split in ('train', 'val'))
        train_loader = create_loader(
            train_set, is_training=True, scale=(0.7, 1.0), ratio=(0.9, 1.1), hflip=0., color_jitter=0., **options)

        history, predictions = train(model, train_loader, create_loader(val_set, **options), args)
        draw(folder / 'demo.png', val_set.reader.samples, predictions, history)
        # as those of timm's `train.py`, in plain values: timm loads checkpoints without running pickled code
        told = {key: str(value) if key == 'output' else value for key, value in vars(args).items() if key != 'run'}
        torch.save({
            'epoch': args.epochs - 1, 'arch': args.model, 'state_dict': model.state_dict(), 'version': 2,
            'args': argparse.Namespace(**told, **config, num_classes=NUM_CLASSES), 'metric': history[-1][1],
        }, folder / 'last.pth.tar')
        result = dict(
            top1=history[-1][1], images=len(val_set), checkpoint=str(args.output / 'last.pth.tar'),
            picture=str(args.output / 'demo.png'), data=str(args.output / 'data'))
        (folder / 'result.json').write_text(json.dumps(result, indent=2) + '\n')
    print(json.dumps(result))


def write_digits(folder: Path) -> None:
    """Write the 1,797 digits as 8 x 8 grey PNG files, one folder per split and class; a fifth is held out."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    splits = train_test_split(range(len(digits.target)), test_size=0.2, random_state=0, stratify=digits.target)
    for split, members in zip(('train', 'val'), splits):
        for member in members:
            path = folder / split / str(digits.target[member]) / f'{member:04d}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            grey = np.round(digits.images[member] * (255 / 16)).astype(np.uint8)  # 0..16 -> 0..255
            Image.fromarray(grey).save(path)


def train(model: Any, train_loader: Any, val_loader: Any, args: argparse.Namespace) -> tuple[History, list[int]]:
    """Train with AdamW and a cosine schedule per update, and measure after each epoch.

    Returns:
        The history, and the class that is predicted at last for each held-out image.
    """
    import torch
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import AverageMeter, dispatch_clip_grad
    from tqdm import tqdm

    optimizer = create_optimizer_v2(model, opt='adamw', lr=args.lr, weight_decay=0.05)
    scheduler, _ = create_scheduler_v2(
        optimizer, num_epochs=args.epochs, warmup_epochs=1, warmup_lr=1e-6, step_on_epochs=False,
        updates_per_epoch=len(train_loader))
    loss_fn = LabelSmoothingCrossEntropy(0.1)
    history: History = []
    with tqdm(total=args.epochs * len(train_loader), unit='update', mininterval=1, file=sys.stderr) as progress:
        for epoch in range(args.epochs):
            model.train()
            losses = AverageMeter()
            for images, target in train_loader:
                images, target = images.to(args.device), target.to(args.device)
                loss = loss_fn(model(images), target)
                if not torch.isfinite(loss):
                    raise RuntimeError(f'the loss is {loss.item()} in epoch {epoch}: lower --lr')
                optimizer.zero_grad()
                loss.backward()
                dispatch_clip_grad(model.parameters(), 1.0)
                optimizer.step()
                losses.update(loss.item(), len(images))
                progress.update()
                scheduler.step_update(progress.n)
                progress.set_postfix(
                    epoch=epoch, loss=f'{losses.avg:.3f}', top1=history[-1][1] if history else '-')
            model.eval()
            with torch.inference_mode():
                found = [(model(images.to(args.device)).argmax(dim=1).cpu(), target) for images, target in val_loader]
            predicted, target = map(torch.cat, zip(*found))
            history.append((losses.avg, round(100 * (predicted == target).double().mean().item(), 2)))
    return history, predicted.tolist()


def draw(path: Path, samples: list[tuple[str, int]], predictions: list[int], history: History) -> None:
    """Draw held-out images with their predictions, mistakes first, and the learning curve.

    Args:
        path: PNG file to write.
        samples: File and class of each image.
        predictions: Predicted class of each image.
        history: Of the training.
    """
    from matplotlib.figure import Figure
    from PIL import Image

    images = [(file, target, predicted) for (file, target), predicted in zip(samples, predictions)]
    wrong = [image for image in images if image[1] != image[2]][:NUM_IMAGES // 3]
    right = [image for image in images if image[1] == image[2]]
    figure = Figure(figsize=(11, 4.5), layout='constrained')
    pictures, curve = figure.subfigures(1, 2, width_ratios=(3, 2), squeeze=False)[0]
    for axes, (file, target, predicted) in zip(
            pictures.subplots(4, NUM_IMAGES // 4).flat, wrong + right[::max(1, len(right) // NUM_IMAGES)]):
        axes.imshow(Image.open(file), cmap='gray')
        is_right = predicted == target
        title = f'{predicted}' if is_right else f'{predicted}, is {target}'
        axes.set_title(title, fontsize=9, color='black' if is_right else 'red')
    for axes in pictures.axes:
        axes.axis('off')
    names = ('training loss', 'held-out top-1, %')
    for axes, name, values in zip(curve.subplots(2, sharex=True), names, zip(*history)):
        axes.plot(range(1, len(history) + 1), values, marker='.')
        axes.set(ylabel=name)
    axes.set(xlabel='epoch', title=f'held-out top-1 {history[-1][1]:.1f} %')
    save_figure(figure, path)
