"""iTPN and Fast-iTPN vision transformers as timm models.

The models register themselves with timm, with no import of this package needed: PyTorch calls `autoload` at the end of
`import torch` (entry-point group `torch.backends`). This file imports neither torch nor timm, and an error here would
break `import torch` for everyone, so it stays as small as it is.

Set TIMM_ITPN_AUTOLOAD=0 to register only on `import timm_itpn.models`.
"""
import functools
import sys
import warnings
from typing import Any

__version__ = '0.1.0'


@functools.cache
def autoload() -> None:
    """Register the models as soon as `timm.models` is there. Never raises; a failure is one warning."""
    try:
        from . import _autoload
        _autoload.install()
    except Exception as error:
        warn(f'{type(error).__name__}: {error}')


def warn(reason: str) -> None:
    """Say that the models are not registered; never raises, not even where warnings are errors."""
    message = f'timm-itpn: its models are not registered with timm: {reason}'
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    except Exception:
        print(message, file=sys.stderr)


def fuse(model: Any) -> Any:
    """A faster copy of a model, for inference only; see `timm_itpn.models.fusion.fuse`."""
    from .models.fusion import fuse
    return fuse(model)


autoload()
