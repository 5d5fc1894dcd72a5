"""What is measured: a model at one size, batch, type and mode, and against whom."""
import re
from typing import NamedTuple

__all__ = [
    'ACCELERATIONS', 'COMPILE_MODES', 'DTYPES', 'MODES', 'PEERS', 'Case', 'Rivals', 'Rounds', 'Size', 'check',
    'height_width', 'parse_size',
]

MODES = ('forward', 'train', 'latency')
STRIDE = 16  # pixels per token; sides are multiples of it
MIN_REPEATS = 3  # below that a median says nothing
ACCELERATIONS = ('light', 'full')  # those of `tokens.schedule`, which imports torch
COMPILE_MODES = ('default', 'reduce-overhead', 'max-autotune', 'max-autotune-no-cudagraphs')
PEERS = (
    'vit_base_patch16_224', 'eva02_base_patch14_224', 'hiera_base_plus_224', 'swin_base_patch4_window7_224')

Size = int | str  # side of a square in pixels, or 'HEIGHTxWIDTH'

# --dtype -> (type of weights and images, type that autocast computes in, None without autocast)
DTYPES: dict[str, tuple[str, str | None]] = {
    'float32': ('float32', None),
    'bfloat16': ('bfloat16', None),
    'float16': ('float16', None),
    'amp_bfloat16': ('float32', 'bfloat16'),
}


class Case(NamedTuple):
    """What identifies a measurement, apart from who is measured and on what machine.

    Attributes:
        model: Name in timm.
        size: Side of the images in pixels, or 'HEIGHTxWIDTH' if they are no squares; see `parse_size`.
        batch: Images per call.
        dtype: A key of `DTYPES`.
        mode: 'forward', 'train' (forward, loss and backward; no optimizer) or 'latency' (one call at a time). The loss
            is cross-entropy, or with `pyramid` the sum of the mean squares of the levels.
        grad_checkpointing: Recompute activations in the backward pass.
        pyramid: Backbone and feature pyramid (strides 4 to 64) instead of backbone and classifier.
    """
    model: str = 'fast_itpn_base'
    size: Size = 224
    batch: int = 8
    dtype: str = 'float32'
    mode: str = 'forward'
    grad_checkpointing: bool = False
    pyramid: bool = False

    def __str__(self) -> str:
        pyramid = ', pyramid' if self.pyramid else ''
        checkpointing = ', gradient checkpointing' if self.grad_checkpointing else ''
        return f'{self.model}{pyramid}, {self.mode}, {self.size} px, batch {self.batch}, {self.dtype}{checkpointing}'


class Rivals(NamedTuple):
    """Who is measured beside the model.

    Attributes:
        baseline: The same model computed the unfused way, with the same weights.
        fuse: The model after `fuse`.
        compile: The model under `torch.compile` in this mode, '' for not; with `fuse` the fused model too.
        peers: Models of timm.
        against: FILE:FUNCTION that builds any other module, '' for none.
        accelerations: The model with the same weights and token gathering and migration, by name; what `fuse` and
            `compile` make of them too.
        objective: A step of pre-training with this objective, without its teacher, '' for none.
    """
    baseline: bool = False
    fuse: bool = False
    compile: str = ''
    peers: tuple[str, ...] = ()
    against: str = ''
    accelerations: tuple[str, ...] = ()
    objective: str = ''


class Rounds(NamedTuple):
    """How often everyone runs; 0 = as many as suit the mode and the device."""
    repeats: int = 0
    warmup: int = 0

    def resolved(self, mode: str, device: str) -> 'Rounds':
        """The same without zeros: on CUDA clocks and graphs take more calls to settle."""
        repeats = self.repeats or (50 if mode == 'latency' else 10 if device == 'cpu' else 30)
        return Rounds(repeats, self.warmup or (1 if device == 'cpu' else 5))


def parse_size(text: str) -> Size:
    """'N', the side of a square, -> N; 'HEIGHTxWIDTH' stays as it is, unless it is a square.

    Raises:
        ValueError: `text` is neither.
    """
    match = re.fullmatch(r'([0-9]+)(?:x([0-9]+))?', text)
    if match is None:
        raise ValueError(f'size {text} is not usable: give a side such as 224, or HEIGHTxWIDTH such as 800x1344')
    height = int(match[1])
    width = int(match[2] or height)
    return height if height == width else f'{height}x{width}'


def height_width(size: Size) -> tuple[int, int]:
    """Height and width of images of a size, in pixels."""
    if isinstance(size, int):
        return size, size
    height, width = map(int, size.split('x'))
    return height, width


def check(case: Case, rivals: Rivals, rounds: Rounds, device: str) -> None:
    """Raise if the case cannot be measured.

    Raises:
        ValueError: Something in the arguments is not usable, or two of them exclude each other.
        RuntimeError: There is no CUDA device.
    """
    import torch

    from ..models.names import check_name

    check_name(case.model)
    if any(side < STRIDE or side % STRIDE for side in height_width(parse_size(str(case.size)))):
        what = 'it' if isinstance(case.size, int) else 'each side'
        raise ValueError(f'size {case.size} is not usable: {what} must be a multiple of {STRIDE}')
    if case.batch < 1:
        raise ValueError(f'batch {case.batch} is not usable: it must be at least 1')
    for what, value, known in (('dtype', case.dtype, DTYPES), ('mode', case.mode, MODES)):
        if value not in known:
            raise ValueError(f'{what} {value!r} is unknown, choose one of: {", ".join(known)}')
    if rivals.compile and rivals.compile not in COMPILE_MODES:
        raise ValueError(f'compile mode {rivals.compile!r} is unknown, choose one of: {", ".join(COMPILE_MODES)}')
    for acceleration in rivals.accelerations:
        if acceleration not in ACCELERATIONS:
            raise ValueError(f'acceleration {acceleration!r} is unknown, choose one of: {", ".join(ACCELERATIONS)}')
    if rivals.objective and (case.mode != 'train' or not case.pyramid or not isinstance(case.size, int)):
        raise ValueError('a step of pre-training is one of training, on squares and with the pyramid: use --objective '
                         'with --mode train --pyramid and one number for the size')
    if case.pyramid and rivals.peers:
        raise ValueError('the peers are classifiers, which a pyramid cannot be compared with: leave out one of the two')
    if rounds.repeats and rounds.repeats < MIN_REPEATS:
        raise ValueError(f'{rounds.repeats} repeats are too few for a median: ask for at least {MIN_REPEATS}')
    if rounds.warmup < 0:
        raise ValueError(f'{rounds.warmup} rounds of warm-up are not usable: ask for at least 1')
    if case.mode == 'train' and rivals.fuse:
        raise ValueError('a fused model cannot be trained: leave out --fuse, or the mode train')
    if case.mode != 'train' and case.grad_checkpointing:
        raise ValueError(f'gradient checkpointing has no effect in the mode {case.mode}: use it with the mode train')
    if device == 'cuda' and not torch.cuda.is_available():
        raise RuntimeError('there is no CUDA device: measure with --device cpu, or --suite cpu')
