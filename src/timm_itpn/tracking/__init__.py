"""Several images through one model, as visual trackers need it."""
from .embeddings import foreground_share
from .encoder import JointEncoder

__all__ = ['JointEncoder', 'foreground_share']
