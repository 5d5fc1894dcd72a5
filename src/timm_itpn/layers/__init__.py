"""Modules that both families are built from."""
from .attention import Attention as Attention
from .patch_embed import ConvPatchMerge as ConvPatchMerge
from .patch_embed import StemPatchEmbed as StemPatchEmbed
from .pos_embed import resample_pos_embed as resample_pos_embed
