"""Fixed lists of cases: what the committed rows are measured by."""
from .cases import ACCELERATIONS, PEERS, Case, Rivals, Rounds

__all__ = ['SUITES']

BASE, TINY, LARGE = 'fast_itpn_base', 'fast_itpn_tiny', 'fast_itpn_large'
PLAIN = Rivals(baseline=True)
FUSED = Rivals(baseline=True, fuse=True)
FUSED_PEERS = Rivals(baseline=True, fuse=True, peers=PEERS)
COMPILED = Rivals(baseline=True, fuse=True, compile='max-autotune')
COMPILED_TRAIN = Rivals(baseline=True, compile='max-autotune')
GRAPHS = Rivals(baseline=True, compile='reduce-overhead')
ACCELERATED = Rivals(accelerations=ACCELERATIONS)
ACCELERATED_FUSED = Rivals(fuse=True, accelerations=ACCELERATIONS)
ACCELERATED_ALL = Rivals(baseline=True, fuse=True, accelerations=ACCELERATIONS)
PRETRAINING = Rivals(objective='clip')
COMPILED_PEERS = Rivals(baseline=True, fuse=True, compile='max-autotune', peers=PEERS)

SUITES: dict[str, list[tuple[Case, Rivals, Rounds]]] = {
    'cpu': [
        (Case(BASE, 224, 8, 'float32', 'forward'), FUSED_PEERS, Rounds(9, 1)),
        (Case(BASE, 224, 8, 'bfloat16', 'forward'), FUSED, Rounds(9, 1)),
        (Case(BASE, 512, 1, 'float32', 'forward'), FUSED, Rounds(9, 1)),
        (Case(BASE, 512, 1, 'bfloat16', 'forward'), FUSED, Rounds(9, 1)),
        (Case(BASE, 1024, 1, 'float32', 'forward'), FUSED, Rounds(3, 1)),
        (Case(BASE, 1024, 1, 'bfloat16', 'forward'), FUSED, Rounds(3, 1)),
        (Case(BASE, 224, 8, 'float32', 'train'), PLAIN, Rounds(7, 1)),
        (Case(BASE, 512, 2, 'float32', 'train'), PLAIN, Rounds(5, 1)),
        (Case(BASE, 224, 8, 'float32', 'train', pyramid=True), PRETRAINING, Rounds(7, 1)),
        (Case(BASE, 224, 1, 'float32', 'latency'), FUSED, Rounds(15, 1)),
        (Case(TINY, 224, 8, 'float32', 'forward'), FUSED, Rounds(9, 1)),
        (Case(TINY, 224, 1, 'float32', 'latency'), FUSED, Rounds(15, 1)),
        (Case(LARGE, 224, 8, 'float32', 'forward'), FUSED, Rounds(3, 1)),
        (Case(LARGE, 224, 1, 'float32', 'latency'), FUSED, Rounds(9, 1)),
        (Case(BASE, 1024, 1, 'float32', 'forward', pyramid=True), ACCELERATED_ALL, Rounds(3, 1)),
        (Case(BASE, 1024, 1, 'bfloat16', 'forward', pyramid=True), ACCELERATED_ALL, Rounds(3, 1)),
        (Case(BASE, '800x1344', 1, 'float32', 'forward', pyramid=True), ACCELERATED_FUSED, Rounds(3, 1)),
        (Case(BASE, 1536, 1, 'float32', 'forward', pyramid=True), ACCELERATED, Rounds(3, 1)),
    ],
    'gpu': [
        (Case(BASE, 224, 128, 'bfloat16', 'forward'), COMPILED_PEERS, Rounds(30, 5)),
        (Case(BASE, 1024, 4, 'bfloat16', 'forward'), COMPILED, Rounds(20, 5)),
        (Case(BASE, 224, 128, 'amp_bfloat16', 'train'), COMPILED_TRAIN, Rounds(20, 5)),
        (Case(BASE, 512, 16, 'amp_bfloat16', 'train'), PLAIN, Rounds(20, 5)),
        (Case(BASE, 224, 128, 'amp_bfloat16', 'train', pyramid=True), PRETRAINING, Rounds(20, 5)),
        (Case(BASE, 224, 1, 'float16', 'latency'), GRAPHS, Rounds(50, 10)),
        (Case(BASE, 224, 128, 'float32', 'forward'), FUSED, Rounds(10, 3)),
        (Case(TINY, 224, 128, 'bfloat16', 'forward'), FUSED, Rounds(30, 5)),
        (Case(LARGE, 224, 64, 'bfloat16', 'forward'), FUSED, Rounds(20, 5)),
        (Case(BASE, 1024, 4, 'bfloat16', 'forward', pyramid=True), ACCELERATED_ALL, Rounds(20, 5)),
        (Case(BASE, '800x1344', 4, 'bfloat16', 'forward', pyramid=True), ACCELERATED_FUSED, Rounds(20, 5)),
        (Case(BASE, 1536, 4, 'bfloat16', 'forward', pyramid=True), ACCELERATED, Rounds(20, 5)),
    ],
}
