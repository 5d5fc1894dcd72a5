"""`timm-itpn demo`: train a Fast-iTPN on scikit-learn's digits with timm's parts, validate it, draw what came out."""
import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from .show import check_device

REQUIRES = ('sklearn', 'matplotlib', 'tqdm')
NUM_CLASSES = 10


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        'demo', help='train a model on handwritten digits', formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--output', type=Path, default=Path('output/demo'), help='new folder for everything written')
    parser.add_argument('--model', default='fast_itpn_tiny', help='any model of this package')
    parser.add_argument('--pretrained', action='store_true', help='start from the published weights')
    parser.add_argument('--img-size', type=int, default=32, help='side of the images in pixels, a multiple of 16')
    parser.add_argument('--epochs', type=int, default=9, help='passes over the 1,437 training images')
    parser.add_argument('--batch-size', type=int, default=64, help='images per update')
    parser.add_argument('--lr', type=float, default=5e-4, help='peak learning rate')
    parser.add_argument('--device', default='cpu', help='PyTorch device')
    parser.add_argument('--seed', type=int, default=0, help='of weights, order and augmentation')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    missing = [name for name in REQUIRES if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeError(f"the demo needs {', '.join(missing)}: pip install 'timm-itpn[demo]'")
    if args.output.exists():
        raise ValueError(f'{args.output} exists already: name another folder with --output, or remove it')
    if args.epochs < 1:
        raise ValueError(f'--epochs is {args.epochs}, but must be at least 1')
    check_device(args.device)

    import timm
    import torch
    from timm.data import create_dataset, create_loader, resolve_data_config
    from timm.utils import random_seed

    random_seed(args.seed)
    model = timm.create_model(
        args.model, pretrained=args.pretrained, img_size=args.img_size, num_classes=NUM_CLASSES, drop_path_rate=0.1)
    model.to(args.device)
    write_digits(args.output / 'data')
    data_config = resolve_data_config(
        {'input_size': (3, args.img_size, args.img_size), 'crop_pct': 1.0}, model=model)
    common = dict(
        input_size=data_config['input_size'],
        interpolation=data_config['interpolation'],
        mean=data_config['mean'],
        std=data_config['std'],
        batch_size=args.batch_size,
        num_workers=0,
        persistent_workers=False,
        use_prefetcher=False,
        device=torch.device(args.device),
    )
    train_set = create_dataset('', root=str(args.output / 'data'), split='train')
    val_set = create_dataset('', root=str(args.output / 'data'), split='val')
    train_loader = create_loader(
        train_set, is_training=True, scale=(0.7, 1.0), ratio=(0.9, 1.1), hflip=0., color_jitter=0., **common)
    val_loader = create_loader(val_set, crop_pct=data_config['crop_pct'], **common)

    history, predictions = train(model, train_loader, val_loader, args)
    draw(args.output / 'demo.png', val_set, predictions, history)
    result = {
        'top1': history[-1]['top1'],
        'images': len(val_set),
        'checkpoint': str(args.output / 'last.pth.tar'),
        'picture': str(args.output / 'demo.png'),
        'data': str(args.output / 'data'),
    }
    (args.output / 'result.json').write_text(json.dumps(result, indent=2) + '\n')
    print(json.dumps(result))


def write_digits(folder: Path) -> None:
    """Write the 1,797 digits as 8 x 8 grey PNG files, one folder per split and class; a fifth is held out."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    numbers = np.arange(len(digits.target))
    train, val = train_test_split(numbers, test_size=0.2, random_state=0, stratify=digits.target)
    for split, members in (('train', train), ('val', val)):
        for number in members:
            path = folder / split / str(digits.target[number]) / f'{number:04d}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            grey = np.round(digits.images[number] * (255 / 16)).astype(np.uint8)  # 0..16 -> 0..255
            Image.fromarray(grey).save(path)


def train(
        model: Any,
        train_loader: Any,
        val_loader: Any,
        args: argparse.Namespace,
) -> tuple[list[dict[str, float]], list[int]]:
    """Train with AdamW and a cosine schedule per update, saving a checkpoint after each epoch.

    Returns:
        Training loss and held-out top-1 accuracy (percent) of each epoch, and the last predicted classes.
    """
    import torch
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import AverageMeter, CheckpointSaver, dispatch_clip_grad
    from tqdm import tqdm

    optimizer = create_optimizer_v2(model, opt='adamw', lr=args.lr, weight_decay=0.05)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        num_epochs=args.epochs,
        warmup_epochs=1,
        warmup_lr=1e-6,
        step_on_epochs=False,
        updates_per_epoch=len(train_loader),
    )
    saver = CheckpointSaver(
        model, optimizer, args=checkpoint_args(args), checkpoint_dir=str(args.output), max_history=1)
    loss_fn = LabelSmoothingCrossEntropy(0.1)
    history: list[dict[str, float]] = []
    num_updates = 0
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
                num_updates += 1
                scheduler.step_update(num_updates)
                losses.update(loss.item(), len(images))
                progress.update()
                last_top1 = history[-1]['top1'] if history else '-'
                progress.set_postfix(epoch=epoch, loss=f'{losses.avg:.3f}', top1=last_top1)
            top1, predictions = validate(model, val_loader, args.device)
            history.append({'loss': round(losses.avg, 4), 'top1': round(top1, 2)})
            saver.save_checkpoint(epoch, metric=top1)
    return history, predictions


def checkpoint_args(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments as plain values: timm loads checkpoints without running pickled code."""
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items() if key != 'run'}
    return argparse.Namespace(**plain)


def validate(model: Any, loader: Any, device: str) -> tuple[float, list[int]]:
    """Return the top-1 accuracy in percent, and the predicted class of each image in order."""
    import torch

    model.eval()
    predictions, correct = [], 0
    with torch.inference_mode():
        for images, target in loader:
            predicted = model(images.to(device)).argmax(dim=1).cpu()
            correct += (predicted == target).sum().item()
            predictions += predicted.tolist()
    return 100 * correct / len(predictions), predictions


def draw(
        path: Path,
        dataset: Any,
        predictions: list[int],
        history: list[dict[str, float]],
        num_images: int = 24,
) -> None:
    """Draw held-out images with their predictions, mistakes first, and the learning curve."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    samples = list(zip(dataset.reader.samples, predictions))  # ((file, class), predicted class)
    wrong = [sample for sample in samples if sample[0][1] != sample[1]]
    right = [sample for sample in samples if sample[0][1] == sample[1]]
    shown = wrong[:num_images // 3]
    step = max(1, len(right) // (num_images - len(shown)))
    shown += right[::step][:num_images - len(shown)]

    figure = Figure(figsize=(11, 4.5), layout='constrained')
    FigureCanvasAgg(figure)
    pictures, curve = figure.subfigures(1, 2, width_ratios=(3, 2), squeeze=False)[0]
    for axes, ((file, target), predicted) in zip(pictures.subplots(4, num_images // 4).flat, shown):
        axes.imshow(Image.open(file), cmap='gray')
        axes.set_title(f'{predicted}' if predicted == target else f'{predicted}, is {target}',
                       fontsize=9, color='black' if predicted == target else 'red')
        axes.axis('off')
    epochs = range(1, len(history) + 1)
    loss_axes = curve.subplots()
    loss_axes.plot(epochs, [row['loss'] for row in history], color='tab:gray', label='training loss')
    loss_axes.set(xlabel='epoch', ylabel='training loss')
    top1_axes = loss_axes.twinx()
    top1_axes.plot(epochs, [row['top1'] for row in history], color='tab:blue', label='held-out top-1')
    top1_axes.set(ylabel='held-out top-1, %', title=f'held-out top-1 {history[-1]["top1"]:.1f} %')
    figure.legend(loc='outside lower right', ncols=2, fontsize=9)
    figure.savefig(path, dpi=120)
