"""iTPN and Fast-iTPN vision transformers as timm models.

The models register themselves with timm, with no import of this package needed (see `timm_itpn_autoload`, the module
beside it). Importing this package imports neither torch nor timm; if `timm.models` is loaded, it registers the models.
"""
from typing import Any

from timm_itpn_autoload import autoload

__all__ = ['fuse']
__version__ = '0.1.0'


def fuse(model: Any) -> Any:
    """A faster copy of a model, for inference only; see `timm_itpn.models.fusion.fuse`."""
    from .models.fusion import fuse
    return fuse(model)


autoload()
