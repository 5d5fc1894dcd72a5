"""Small runs of detection."""
from support.coco import write_coco
from timm_itpn.detection.arguments import add_arguments
from timm_itpn.detection.task import detect
from timm_itpn.engine.arguments import ConfigurableParser

BACKBONE = dict(embed_dim=64, depths=(1, 1, 2), num_heads=1, pyramid_dim=32)


def write_splits(folder, train=4, val=2):
    """Digits in the layout of COCO."""
    (folder / 'annotations').mkdir(parents=True)
    for seed, (split, num) in enumerate((('train', train), ('val', val))):
        (folder / split).mkdir()
        write_coco(folder / split, num, seed=seed).rename(folder / 'annotations' / f'instances_{split}.json')
    return folder


def command(data, output, *more):
    """Arguments of a run of 4 updates."""
    return [
        '--data-dir', str(data), '--output', str(output),
        '--model-kwargs', *(f'{key}={value}' for key, value in BACKBONE.items()),
        '--head-dim', '32', '--head-norm', 'group', '--box-samples', '16', '--num-proposals', '50',
        '--detector-kwargs', 'rpn_batch_size_per_image=32', '--batch-size', '2', '--epochs', '2', '--lr', '1e-3',
        '--short-sides', '64', '80', '--workers', '0', '--device', 'cpu', '--deterministic', '--log-interval', '1',
        *more]


def parse(argv):
    parser = ConfigurableParser()
    add_arguments(parser)
    return parser.parse_args(argv)


def run(argv):
    return detect(parse(argv))
