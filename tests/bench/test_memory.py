"""Peak memory against patterns of allocation that are known."""
import pytest
import torch
import torch.nn as nn

from timm_itpn.bench.memory import peak_bytes

KIB = 1024


def block(num_kib):
    return torch.empty(num_kib * KIB, dtype=torch.uint8)


def test_peak_is_what_was_in_use_at_once():
    def call():
        a = block(100)
        b = block(50)
        del a
        c = block(60)  # 110 in use, after 150
        return b, c

    assert peak_bytes(call, 'cpu') == 150 * KIB


def test_what_was_there_before_does_not_count():
    before = block(1000)
    assert peak_bytes(before.clone, 'cpu') == 1000 * KIB
    assert peak_bytes(before.zero_, 'cpu') == 0


def test_gradients_count_and_weights_do_not(one_thread):
    layer = nn.Linear(256, 256, bias=False)
    x = torch.randn(1, 256)

    def call():
        layer(x).sum().backward()
        layer.zero_grad(set_to_none=True)

    weight = 256 * 256 * 4
    assert weight <= peak_bytes(call, 'cpu') < 1.1 * weight
    with torch.inference_mode():
        assert peak_bytes(lambda: layer(x), 'cpu') == 256 * 4


def test_count_repeats_exactly(one_thread):
    layer = nn.TransformerEncoderLayer(32, 2, batch_first=True)
    x = torch.randn(2, 8, 32)

    def call():
        layer(x).sum().backward()
        layer.zero_grad(set_to_none=True)

    assert len({peak_bytes(call, 'cpu') for _ in range(3)}) == 1


@pytest.mark.gpu
def test_peak_on_cuda():
    def call():
        a = torch.empty(4 * KIB * KIB, dtype=torch.uint8, device='cuda')
        b = torch.empty(2 * KIB * KIB, dtype=torch.uint8, device='cuda')
        del a
        return b

    assert peak_bytes(call, 'cuda') == 6 * KIB * KIB
