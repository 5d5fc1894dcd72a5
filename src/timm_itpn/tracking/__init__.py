"""Several images through one model, as visual trackers need it."""
from .encoder import JointEncoder
from .types import foreground_share

__all__ = ['JointEncoder', 'foreground_share']
