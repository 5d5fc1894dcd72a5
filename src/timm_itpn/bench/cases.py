"""What is measured: a model at one size, batch, type and mode, and what beside it. Nothing here needs torch."""
import re
from collections.abc import Sequence
from dataclasses import dataclass

MODES = ('forward', 'train', 'latency')
COMPILE_MODES = ('default', 'reduce-overhead', 'max-autotune', 'max-autotune-no-cudagraphs')
PEERS = (
    'vit_base_patch16_224', 'eva02_base_patch14_224', 'hiera_base_plus_224', 'swin_base_patch4_window7_224')

DTYPES = ('float32', 'bfloat16', 'float16', 'amp_bfloat16')  # amp_: of autocast, weights and images are float32


@dataclass(frozen=True)
class Case:
    """One measurement, apart from the candidates and the machine.

    The loss of training is cross-entropy, or with `pyramid` the sum of the mean squares of the levels.
    """
    model: str = 'fast_itpn_base'
    img_size: tuple[int, int] = (224, 224)  # height, width in pixels, multiples of 16
    batch: int = 8  # images per call
    dtype: str = 'float32'  # one of DTYPES
    mode: str = 'forward'  # or 'train' (forward, loss and backward, no optimizer) or 'latency' (forward, with its p95)
    pyramid: bool = False  # backbone and feature pyramid (strides 4 to 64) instead of backbone and classifier
    templates: int = 0  # images of half the side that are encoded with each, as trackers do; 0 for none

    @property
    def weight_dtype(self) -> str:
        """Type of weights and images."""
        return 'float32' if self.dtype.startswith('amp_') else self.dtype

    def __str__(self) -> str:
        height, width = self.img_size
        size = str(height) if height == width else f'{height}x{width}'
        pyramid = ', pyramid' if self.pyramid else f', templates {self.templates}' if self.templates else ''
        return f'{self.model}{pyramid}, {self.mode}, {size} px, batch {self.batch}, {self.dtype}'


@dataclass(frozen=True)
class Asked:
    """What is measured beside the model, on which device, and how often."""
    baseline: bool = False  # the same model computed the unfused way, with the same weights
    fuse: bool = False  # the model, and each accelerated one, after `fuse`
    acceleration: Sequence[str] = ()  # the model with the same weights and an acceleration, by name
    compile: str = ''  # the model, accelerated and fused too, under `torch.compile` in this mode
    onnx: bool = False  # the model in ONNX Runtime
    objective: str = ''  # a step of pre-training with this objective, without its teacher
    peers: Sequence[str] = ()  # models of timm
    against: str = ''  # FILE:FUNCTION that builds any other module
    device: str = 'cpu'  # or 'cuda'
    repeats: int | None = None  # rounds that count, at least 3; None: as suits mode and device
    warmup: int | None = None  # rounds before them; None: as suits the device


def parse_size(text: str) -> tuple[int, int]:
    """'N', the side of a square, or 'HEIGHTxWIDTH' -> (height, width).

    Raises:
        ValueError: `text` is neither.
    """
    match = re.fullmatch(r'([0-9]+)(?:x([0-9]+))?', text)
    if match is None:
        raise ValueError(f'size {text} is not usable: give a side such as 224, or HEIGHTxWIDTH such as 800x1344')
    return int(match[1]), int(match[2] or match[1])


def check(case: Case, asked: Asked) -> None:
    """Raise ValueError if the case cannot be measured: an argument is not usable, or two of them exclude each other."""
    from ..layers.patch_embed import token_grid
    from ..models import check_name

    check_name(case.model)
    rows, columns = token_grid(case.img_size)
    if asked.baseline and not case.model.startswith('fast_itpn'):
        raise ValueError(f'{case.model} has no baseline, only fast_itpn_* models have one: leave out --baseline')
    if asked.objective and (case.mode != 'train' or not case.pyramid or rows != columns):
        raise ValueError(
            'a step of pre-training needs square images and the pyramid: use --objective with --mode train --pyramid')
    if case.templates and (case.pyramid or rows % 2 or columns % 2):
        raise ValueError('templates have half the side, and no pyramid: use sides that are multiples of 32')
    if asked.onnx and (asked.device != 'cpu' or case.dtype != 'float32' or case.mode == 'train'):
        raise ValueError('ONNX Runtime is measured on the CPU in float32 and without training: leave out --onnx')
    if asked.peers and (case.pyramid or case.templates):
        raise ValueError('peers are classifiers: leave out --peers, or --pyramid and --templates')
    if asked.fuse and case.mode == 'train':
        raise ValueError('a fused model cannot be trained: leave out --fuse, or the mode train')
