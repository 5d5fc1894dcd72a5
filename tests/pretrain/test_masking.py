"""Masks."""
import pytest
import torch

from timm_itpn.pretrain.data import MASKINGS, block_masking
from timm_itpn.pretrain.pixel import keep_indices


def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize('masking', MASKINGS)
@pytest.mark.parametrize(('grid', 'num'), [((14, 14), 75), ((14, 14), 1), ((14, 14), 195), ((2, 2), 3), ((7, 20), 60)])
def test_number_is_exact_and_seeds_repeat(masking, grid, num):
    masks = [MASKINGS[masking](grid, num, generator(seed)) for seed in range(50)]
    assert all(mask.shape == grid and mask.dtype == torch.bool and int(mask.sum()) == num for mask in masks)
    assert torch.equal(masks[7], MASKINGS[masking](grid, num, generator(7)))
    if num > 1 and grid[0] * grid[1] > 10:
        assert any(not torch.equal(masks[0], mask) for mask in masks[1:])


@pytest.mark.parametrize(('masking', 'least'), [('random', 0.3), ('block', 0.02)])
def test_no_token_is_left_out(masking, least):
    """Blocks reach the corners least: few of their positions cover them."""
    share = torch.stack([MASKINGS[masking]((14, 14), 75, generator(seed)) for seed in range(2000)]).float().mean(dim=0)
    assert share.mean().item() == pytest.approx(75 / 196)
    assert share.min() > least


def test_blocks_hang_together():
    """A masked token has more masked neighbours than in a random mask of as many, which has 75 / 196 of them."""
    masks = torch.stack([block_masking((14, 14), 75, generator(seed)) for seed in range(200)])
    pairs = (masks[:, 1:] & masks[:, :-1]).sum() / masks[:, :-1].sum()
    assert pairs > 0.7


def test_kept_tokens_are_those_not_masked_in_raster_order():
    masked = torch.stack([block_masking((14, 14), 75, generator(seed)) for seed in range(3)])
    kept = keep_indices(masked, 75)
    for i in range(3):
        assert torch.equal(kept[i], (~masked[i]).flatten().nonzero()[:, 0])
