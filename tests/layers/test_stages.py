"""Stages on the CPU work on a few rows of maps at a time, which nobody should notice."""
import pytest
import torch
from support.small import FAMILIES, PYRAMIDS, images, small_model

import timm_itpn
from timm_itpn.layers import blocks


@pytest.mark.parametrize('fused', [False, True], ids=['model', 'fused'])
@pytest.mark.parametrize('name', [*FAMILIES, *PYRAMIDS])
def test_rows_at_a_time_give_what_the_whole_does(name, fused, monkeypatch):
    model = small_model(name, num_classes=0, features_only=name in PYRAMIDS)
    model = timm_itpn.fuse(model) if fused else model
    x = images(5, 3, 64, 64)
    with torch.no_grad():
        whole = model(x)
        for size in (1, 16 * 16 * 32, 2 * 16 * 16 * 32 + 1):
            monkeypatch.setattr(blocks, 'SLICE_SIZE', size)
            torch.testing.assert_close(model(x), whole, rtol=1e-5, atol=1e-5)
        empty = model(x[:0])
    assert all(len(level) == 0 for level in (empty if name in PYRAMIDS else [empty]))


def strong_attention(name, **kwargs):
    stage = small_model(name, **kwargs).stages[2]
    for block in stage.blocks:
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.2)
        torch.nn.init.normal_(block.attn.proj.weight, std=0.2)
    return stage


@pytest.mark.parametrize('attn_impl', ['sdpa', 'reference'])
def test_blocks_run_in_ranges_on_any_sequence_and_a_mask_hides(attn_impl):
    stage = strong_attention('fast_itpn_tiny', attn_impl=attn_impl)
    x = images(2, 7, 128)
    whole = stage.forward_blocks(x, 1, 7)
    torch.testing.assert_close(stage.forward_blocks(stage.forward_blocks(x, 1, 7, 0, 1), 1, 7, 1), whole)
    sees = torch.ones(7, 7, dtype=torch.bool)
    sees[:3, 3:] = False
    alone = stage.forward_blocks(x[:, :3], 1, 3)
    for bias in (sees, torch.zeros(7, 7).masked_fill(~sees, float('-inf'))):
        masked = stage.forward_blocks(x, 1, 7, bias=bias)
        torch.testing.assert_close(masked[:, :3], alone, rtol=1e-5, atol=1e-5)
        assert (masked[:, 3:] - whole[:, 3:]).abs().max() > 1e-3
        stage.grad_checkpointing = True
        torch.testing.assert_close(stage.forward_blocks(x.requires_grad_(), 1, 7, bias=bias), masked)
        stage.grad_checkpointing = False


@pytest.mark.parametrize(('name', 'kwargs', 'message'), [
    ('itpn_tiny', {}, r'relative position bias is for a grid \(4, 4\): use rel_pos_bias=False'),
    ('fast_itpn_tiny', dict(acceleration='full'), 'need a whole map: create the model without acceleration'),
])
def test_stage_that_needs_its_grid_refuses_other_sequences(name, kwargs, message):
    stage = strong_attention(name, **kwargs)
    with pytest.raises(ValueError, match=message):
        stage.forward_blocks(images(2, 7, 128), 1, 7)


def test_bias_is_added_to_that_of_relative_positions():
    stage = strong_attention('itpn_tiny')
    fused = timm_itpn.fuse(stage.eval())
    x, bias = images(2, 16, 128), images(16, 16)
    with torch.no_grad():
        plain, biased = stage.forward_blocks(x, 4, 4), stage.forward_blocks(x, 4, 4, bias=bias)
        shifted = stage.forward_blocks(x, 4, 4, bias=torch.full((16, 16), 2.))
        torch.testing.assert_close(shifted, plain, rtol=1e-4, atol=1e-4)
        assert (biased - plain).abs().max() > 1e-3
        torch.testing.assert_close(fused.forward_blocks(x, 4, 4, bias=bias), biased, rtol=1e-4, atol=1e-4)
