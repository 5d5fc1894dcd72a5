"""Stem and merges against their definitions."""
import pytest
import torch

from timm_itpn.layers import ConvPatchMerge, StemPatchEmbed, resample_pos_embed


def test_stem_is_a_linear_map_of_4_by_4_blocks():
    stem = StemPatchEmbed(img_size=(32, 48), in_chans=2, embed_dim=6)
    x = torch.randn(3, 2, 32, 48)
    blocks = x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3)  # (B, H/4, W/4, C*4*4)
    expected = blocks @ stem.proj.weight.flatten(1).T + stem.proj.bias
    output = stem(x)
    assert output.is_contiguous() and output.shape == (3, 8, 12, 6)
    torch.testing.assert_close(output, expected)


def test_stem_counts_tokens_at_stride_16():
    stem = StemPatchEmbed(img_size=(32, 48))
    assert (stem.img_size, stem.grid_size, stem.num_patches) == ((32, 48), (2, 3), 6)


def test_merge_normalises_each_position_before_joining_four():
    merge = ConvPatchMerge(5, 7)
    x = torch.randn(2, 4, 6, 5)
    normed = torch.nn.functional.layer_norm(x, (5,), eps=1e-6)
    expected = sum(
        normed[:, row::2, column::2] @ merge.reduction.weight[:, :, row, column].T
        for row in range(2) for column in range(2)) + merge.reduction.bias
    output = merge(x)
    assert output.is_contiguous()
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize('dtype', [torch.float16, torch.float64])
def test_pos_embed_is_resampled_by_plain_bicubic(dtype):
    pos_embed = torch.randn(1, 12, 8, dtype=dtype)
    maps = pos_embed.float().reshape(1, 3, 4, 8).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(maps, size=(5, 2), mode='bicubic', align_corners=False)
    resampled = resample_pos_embed(pos_embed, new_size=[5, 2], old_size=[3, 4])
    torch.testing.assert_close(resampled, expected.permute(0, 2, 3, 1).reshape(1, 10, 8).to(dtype))
    assert resample_pos_embed(pos_embed, new_size=[3, 4], old_size=[3, 4]) is pos_embed
