"""Modules that both families are built from."""
import timm.models  # noqa: F401  first: once it has loaded, our models load, which take their parts from files here

from .attention import Attention as Attention
from .blocks import AttentionBlock as AttentionBlock
from .blocks import MlpBlock as MlpBlock
from .patch_embed import ConvPatchMerge as ConvPatchMerge
from .patch_embed import ConvPatchSplit as ConvPatchSplit
from .patch_embed import LinearPatchMerge as LinearPatchMerge
from .patch_embed import LinearPatchSplit as LinearPatchSplit
from .patch_embed import StemPatchEmbed as StemPatchEmbed
from .pos_embed import resample_pos_embed as resample_pos_embed
from .pyramid import FeaturePyramid as FeaturePyramid
from .rel_pos_bias import RelPosBias as RelPosBias
from .stages import AttentionStage as AttentionStage
from .stages import MlpStage as MlpStage
