"""Peak memory against patterns of allocation that are known."""
import pytest
import torch
import torch.nn as nn

from timm_itpn.bench.memory import peak_bytes

KIB = 1024


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])
def test_peak_is_what_was_in_use_at_once(device):
    def block(num_kib):
        return torch.empty(num_kib * KIB, dtype=torch.uint8, device=device)

    def call():
        a = block(4096)
        b = block(2048)
        del a
        c = block(2048)  # 4096 in use, after 6144
        return b, c

    assert peak_bytes(call, device) == 6144 * KIB
    before = block(4096)
    assert peak_bytes(before.clone, device) == 4096 * KIB
    assert peak_bytes(before.zero_, device) == 0


def test_gradients_count_and_weights_do_not(one_thread):
    layer = nn.Linear(256, 256, bias=False)
    x = torch.randn(1, 256)

    def call():
        layer(x).sum().backward()
        layer.zero_grad(set_to_none=True)

    weight = 256 * 256 * 4
    peak = peak_bytes(call, 'cpu')
    assert weight <= peak < 1.1 * weight and peak_bytes(call, 'cpu') == peak
    with torch.inference_mode():
        assert peak_bytes(lambda: layer(x), 'cpu') == 256 * 4
