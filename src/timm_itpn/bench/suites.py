"""Fixed lists of cases, by which the committed rows are measured. Nothing here needs torch."""
from .cases import PEERS, Candidates, Case, Rounds

__all__ = ['SUITES']

_BASE, _TINY, _LARGE = 'fast_itpn_base', 'fast_itpn_tiny', 'fast_itpn_large'
_WIDE = (800, 1344)
_ALL = ('light', 'full')
_PLAIN = Candidates(baseline=True)
_FUSED = Candidates(baseline=True, fuse=True)
_ACCELERATED = Candidates(baseline=True, fuse=True, accelerations=_ALL)
_PRETRAINING = Candidates(objective='clip')
_FRAMES = Candidates(baseline=True, fuse=True, compile='default', onnx=True)
_REPLAYED = Candidates(baseline=True, compile='reduce-overhead')
_MIGRATING = Candidates(baseline=True, fuse=True, accelerations=('full',))


def _square(model: str, side: int, batch: int, dtype: str, mode: str, pyramid: bool = False) -> Case:
    return Case(model, (side, side), batch, dtype, mode, pyramid=pyramid)


def _frame(model: str, side: int, templates: int, mode: str = 'latency') -> Case:
    return Case(model, (side, side), 1, 'float32', mode, templates=templates)


SUITES: dict[str, list[tuple[Case, Candidates, Rounds]]] = {
    'cpu': [
        (_square(_BASE, 224, 8, 'float32', 'forward'), Candidates(True, True, peers=PEERS), Rounds(9, 1)),
        (_square(_BASE, 224, 8, 'bfloat16', 'forward'), _FUSED, Rounds(9, 1)),
        (_square(_BASE, 512, 1, 'float32', 'forward'), _FUSED, Rounds(9, 1)),
        (_square(_BASE, 512, 1, 'bfloat16', 'forward'), _FUSED, Rounds(9, 1)),
        (_square(_BASE, 1024, 1, 'float32', 'forward'), _FUSED, Rounds(3, 1)),
        (_square(_BASE, 1024, 1, 'bfloat16', 'forward'), _FUSED, Rounds(3, 1)),
        (_square(_BASE, 224, 8, 'float32', 'train'), _PLAIN, Rounds(7, 1)),
        (_square(_BASE, 512, 2, 'float32', 'train'), _PLAIN, Rounds(5, 1)),
        (_square(_BASE, 224, 8, 'float32', 'train', pyramid=True), _PRETRAINING, Rounds(7, 1)),
        (_square(_BASE, 224, 1, 'float32', 'latency'), _FUSED, Rounds(15, 1)),
        (_square(_TINY, 224, 8, 'float32', 'forward'), _FUSED, Rounds(9, 1)),
        (_square(_TINY, 224, 1, 'float32', 'latency'), _FUSED, Rounds(15, 1)),
        (_square(_LARGE, 224, 8, 'float32', 'forward'), _FUSED, Rounds(3, 1)),
        (_square(_LARGE, 224, 1, 'float32', 'latency'), _FUSED, Rounds(9, 1)),
        (_square(_BASE, 1024, 1, 'float32', 'forward', pyramid=True), _ACCELERATED, Rounds(3, 1)),
        (_square(_BASE, 1024, 1, 'bfloat16', 'forward', pyramid=True), _ACCELERATED, Rounds(3, 1)),
        (Case(_BASE, _WIDE, 1, 'float32', pyramid=True), Candidates(fuse=True, accelerations=_ALL), Rounds(3, 1)),
        (_square(_BASE, 1536, 1, 'float32', 'forward', pyramid=True), Candidates(accelerations=_ALL), Rounds(3, 1)),
    ],
    'tracking': [  # on the CPU too
        (_frame(_TINY, 224, 1), _FRAMES, Rounds(15, 2)),
        (_frame(_TINY, 384, 1), _FRAMES, Rounds(9, 2)),
        (_frame(_BASE, 224, 2), _FRAMES, Rounds(9, 2)),
        (_frame(_BASE, 224, 5), _FUSED, Rounds(9, 2)),
        (_frame(_BASE, 384, 2), _MIGRATING, Rounds(9, 2)),
        (_frame(_BASE, 224, 2, 'train'), _PLAIN, Rounds(5, 1)),
        (_frame(_BASE, 384, 2, 'train'), _PLAIN, Rounds(5, 1)),
    ],
    'gpu': [
        (_square(_BASE, 224, 128, 'bfloat16', 'forward'), Candidates(True, True, peers=PEERS), Rounds(30, 5)),
        (_square(_BASE, 1024, 4, 'bfloat16', 'forward', pyramid=True), _ACCELERATED, Rounds(20, 5)),
        (_square(_BASE, 1024, 4, 'bfloat16', 'forward'), _FUSED, Rounds(20, 5)),
        (_square(_BASE, 224, 128, 'amp_bfloat16', 'train'), _PLAIN, Rounds(20, 5)),
        (_square(_BASE, 512, 16, 'amp_bfloat16', 'train'), _PLAIN, Rounds(20, 5)),
        (_square(_BASE, 224, 128, 'amp_bfloat16', 'train', pyramid=True), _PRETRAINING, Rounds(20, 5)),
        (_square(_BASE, 224, 128, 'float32', 'forward'), _FUSED, Rounds(10, 3)),
        (_square(_TINY, 224, 128, 'bfloat16', 'forward'), _FUSED, Rounds(30, 5)),
        (_square('itpn_base', 224, 128, 'bfloat16', 'forward'), Candidates(fuse=True), Rounds(30, 5)),
        (Case(_BASE, _WIDE, 4, 'bfloat16', pyramid=True), Candidates(fuse=True, accelerations=_ALL), Rounds(20, 5)),
        (_square(_BASE, 1536, 4, 'bfloat16', 'forward', pyramid=True), Candidates(accelerations=_ALL), Rounds(20, 5)),
        (_square(_LARGE, 224, 64, 'bfloat16', 'forward'), _FUSED, Rounds(20, 5)),
        (_square(_BASE, 224, 1, 'float16', 'latency'), Candidates(True, True, 'reduce-overhead'), Rounds(50, 10)),
        (Case(_BASE, (224, 224), 1, 'float16', 'latency', templates=2), _REPLAYED, Rounds(50, 10)),
        (_square(_BASE, 224, 64, 'bfloat16', 'forward'), Candidates(True, True, 'default'), Rounds(30, 5)),
        (_square(_BASE, 224, 64, 'amp_bfloat16', 'train'), Candidates(True, False, 'default'), Rounds(20, 5)),
    ],
}
