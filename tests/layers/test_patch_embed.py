"""Stem, merges and splits against their definitions."""
import pytest
import torch
from timm.layers import LayerNorm
from timm.models.swin_transformer import PatchMerging

from timm_itpn.layers.patch_embed import (
    ConvPatchMerge,
    ConvPatchSplit,
    LinearPatchMerge,
    LinearPatchSplit,
    StemPatchEmbed,
)
from timm_itpn.layers.stages import resample_pos_embed


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


def test_linear_merge_is_that_of_timms_swin():
    merge, theirs = LinearPatchMerge(6, 10), PatchMerging(6, 10, norm_layer=LayerNorm)
    theirs.load_state_dict(merge.state_dict())
    x = torch.randn(2, 8, 12, 6)
    torch.testing.assert_close(merge(x), theirs(x))


def test_linear_merge_stacks_columns_before_rows():
    merge = LinearPatchMerge(1, 4, norm_layer=lambda *args, **kwargs: torch.nn.Identity())
    torch.nn.init.eye_(merge.reduction.weight)
    x = torch.arange(16.).reshape(1, 4, 4, 1)
    assert merge(x)[0, 0, 1].tolist() == [2., 6., 3., 7.]  # (0, 0), (1, 0), (0, 1), (1, 1) as (row, column)


@pytest.mark.parametrize('split_layer', [ConvPatchSplit, LinearPatchSplit])
def test_split_makes_four_positions_of_each(split_layer):
    split = split_layer(6, 5)
    x = torch.randn(2, 3, 4, 6)
    with torch.no_grad():
        actual = split(x)
        normed = split.norm(x)
        for row in range(2):
            for column in range(2):
                if split_layer is ConvPatchSplit:
                    expected = normed @ split.reduction.weight[:, :, row, column] + split.reduction.bias
                else:
                    expected = normed @ split.reduction.weight.reshape(2, 2, 5, 6)[row, column].T
                torch.testing.assert_close(actual[:, row::2, column::2], expected)
