"""What is measured: a model at one size, batch, type and mode, and what beside it. Nothing here needs torch."""
import re
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ['COMPILE_MODES', 'DTYPES', 'MODES', 'PEERS', 'Candidates', 'Case', 'Rounds', 'check', 'parse_size']

MODES = ('forward', 'train', 'latency')
COMPILE_MODES = ('default', 'reduce-overhead', 'max-autotune', 'max-autotune-no-cudagraphs')
PEERS = (
    'vit_base_patch16_224', 'eva02_base_patch14_224', 'hiera_base_plus_224', 'swin_base_patch4_window7_224')

# --dtype -> (type of weights and images, type that autocast computes in, None without autocast)
DTYPES: dict[str, tuple[str, str | None]] = {
    'float32': ('float32', None),
    'bfloat16': ('bfloat16', None),
    'float16': ('float16', None),
    'amp_bfloat16': ('float32', 'bfloat16'),
}

_STRIDE = 16  # pixels per token
_MIN_REPEATS = 3


@dataclass(frozen=True)
class Case:
    """One measurement, apart from the candidates and the machine.

    The loss of training is cross-entropy, or with `pyramid` the sum of the mean squares of the levels.
    """
    model: str = 'fast_itpn_base'
    img_size: tuple[int, int] = (224, 224)  # height, width in pixels, multiples of 16
    batch: int = 8  # images per call
    dtype: str = 'float32'  # a key of DTYPES
    mode: str = 'forward'  # or 'train' (forward, loss and backward, no optimizer) or 'latency' (forward, with its p95)
    pyramid: bool = False  # backbone and feature pyramid (strides 4 to 64) instead of backbone and classifier
    templates: int = 0  # images of half the side that are encoded with each, as trackers do; 0 for none

    def __str__(self) -> str:
        height, width = self.img_size
        size = str(height) if height == width else f'{height}x{width}'
        pyramid = ', pyramid' if self.pyramid else f', templates {self.templates}' if self.templates else ''
        return f'{self.model}{pyramid}, {self.mode}, {size} px, batch {self.batch}, {self.dtype}'


@dataclass(frozen=True)
class Candidates:
    """What is measured beside the model."""
    baseline: bool = False  # the same model computed the unfused way, with the same weights
    fuse: bool = False  # the model, and each accelerated one, after `fuse`
    compile: str = ''  # all of these under `torch.compile` in this mode too
    peers: tuple[str, ...] = ()  # models of timm
    against: str = ''  # FILE:FUNCTION that builds any other module
    accelerations: tuple[str, ...] = ()  # the model with the same weights and an acceleration, by name
    objective: str = ''  # a step of pre-training with this objective, without its teacher
    onnx: bool = False  # the model in ONNX Runtime too


class Rounds(NamedTuple):
    """How often every candidate runs; None: as suits the mode and the device."""
    repeats: int | None = None
    warmup: int | None = None


def parse_size(text: str) -> tuple[int, int]:
    """'N', the side of a square, or 'HEIGHTxWIDTH' -> (height, width).

    Raises:
        ValueError: `text` is neither.
    """
    match = re.fullmatch(r'([0-9]+)(?:x([0-9]+))?', text)
    if match is None:
        raise ValueError(f'size {text} is not usable: give a side such as 224, or HEIGHTxWIDTH such as 800x1344')
    return int(match[1]), int(match[2] or match[1])


def check(case: Case, candidates: Candidates, rounds: Rounds, device: str) -> None:
    """Raise if the case cannot be measured.

    Raises:
        ValueError: An argument is not usable, or two of them exclude each other.
        RuntimeError: There is no CUDA device.
    """
    import torch

    from ..models import check_name

    check_name(case.model)
    height, width = case.img_size
    if min(height, width) < _STRIDE or height % _STRIDE or width % _STRIDE:
        raise ValueError(f'images of {height} x {width} pixels are not usable: sides must be multiples of {_STRIDE}')
    if candidates.baseline and not case.model.startswith('fast_itpn'):
        raise ValueError(f'{case.model} has no baseline, only fast_itpn_* models have one: leave out --baseline')
    if candidates.objective and (case.mode != 'train' or not case.pyramid or height != width):
        raise ValueError(
            'a step of pre-training needs square images and the pyramid: use --objective with --mode train --pyramid')
    if case.templates and (case.pyramid or height % 32 or width % 32):
        raise ValueError('templates have half the side, and no pyramid: use sides that are multiples of 32')
    if candidates.onnx and (device, case.dtype, case.mode) not in (('cpu', 'float32', mode) for mode in MODES[::2]):
        raise ValueError('ONNX Runtime is measured on the CPU in float32 and without training: leave out --onnx')
    if (case.pyramid or case.templates) and candidates.peers:
        raise ValueError('peers are classifiers: leave out --peers, or --pyramid and --templates')
    if rounds.repeats is not None and rounds.repeats < _MIN_REPEATS:
        raise ValueError(f'{rounds.repeats} repeats are too few for a median: ask for at least {_MIN_REPEATS}')
    if case.mode == 'train' and candidates.fuse:
        raise ValueError('a fused model cannot be trained: leave out --fuse, or the mode train')
    if device == 'cuda' and not torch.cuda.is_available():
        raise RuntimeError('there is no CUDA device: measure with --device cpu, or --suite cpu')
