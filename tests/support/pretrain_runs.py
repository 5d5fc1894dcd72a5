"""Small runs of pre-training."""
import json

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from timm_itpn.engine.arguments import ConfigurableParser
from timm_itpn.pretrain.arguments import add_arguments
from timm_itpn.pretrain.task import pretrain

MODEL_KWARGS = dict(embed_dim=64, depths=(1, 1, 2), num_heads=1, pyramid_dim=32)
PIXEL = ('--objective', 'pixel', '--objective-kwargs', 'decoder_dim=32', 'decoder_depth=1', 'decoder_num_heads=2')
MFM = ('--objective', 'mfm', *PIXEL[2:])
TEACHER = 'test_vit'


def write_images(folder, num=10, classes=2):
    """PNG files of 48 x 40 pixels in folders of classes."""
    generator = np.random.default_rng(0)
    for i in range(num):
        path = folder / 'train' / f'class{i % classes}' / f'{i:03d}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(path)
    return folder


def command(data, output, *more, model='fast_itpn_tiny', objective=PIXEL):
    """Arguments of a run of 8 updates."""
    return [
        '--data-dir', str(data), '--output', str(output), '--model', model,
        '--model-kwargs', *(f'{key}={value}' for key, value in MODEL_KWARGS.items()), *objective,
        '--img-size', '64', '--batch-size', '4', '--epochs', '4', '--warmup-epochs', '1', '--lr', '1e-3',
        '--workers', '0', '--device', 'cpu', '--deterministic', '--log-interval', '1', *more]


def parse(argv):
    parser = ConfigurableParser()
    add_arguments(parser)
    return parser.parse_args(argv)


def run(*args, **kwargs):
    return pretrain(parse(command(*args, **kwargs)))


def weights(output):
    return load_file(output / 'pretrained.safetensors')


def log_lines(output):
    return [json.loads(line) for line in (output / 'log.jsonl').read_text().splitlines()]


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    different = [key for key in ours if not torch.equal(ours[key], theirs[key])]
    assert not different, different


def teacher_file(folder):
    """Random weights of a small teacher."""
    import timm
    torch.manual_seed(0)
    path = folder / 'teacher.safetensors'
    save_file(timm.create_model(TEACHER).state_dict(), path)
    return path
