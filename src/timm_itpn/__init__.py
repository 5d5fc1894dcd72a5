"""iTPN and Fast-iTPN vision transformers as timm models.

The models register themselves with timm, with no import of this package needed (see `timm_itpn_autoload`, the module
beside it). Importing this package imports neither torch nor timm; if `timm.models` is loaded, it registers the models.
"""
from typing import Any

from timm_itpn_autoload import autoload

__all__ = ['fuse']
__version__ = '0.1.0'


def fuse(model: Any) -> Any:
    """Make a copy of a model that is faster and computes the same to float error, for inference only.

    Layer scale and the scale of the scores go into the weights, activations and residual sums are done where the matrix
    product is. What is best depends on device and type, so fuse last: after loading weights, `.to()` and `.eval()`. The
    copy has no gradients and no training mode, its state dict is not that of the model, and hooks of the layers that
    are replaced are gone. timm's `reparameterize_model` and `validate.py --reparam` do the same.

    Args:
        model: A model of this package in evaluation mode, or one that contains it (a detector, say).

    Returns:
        The copy; `model` stays as it is.

    Raises:
        RuntimeError: The model is in training mode.
        ValueError: There is nothing in it to fuse, or a layer is not what it was: an adapter, say.
    """
    from timm.models import reparameterize_model
    if any(module.training for module in model.modules()):
        raise RuntimeError('A model in training mode cannot be fused: call model.eval() first.')
    if not any(hasattr(module, 'fuse') for module in model.modules()):
        raise ValueError(f'{type(model).__name__} has no layers of this package, or they are fused already.')
    return reparameterize_model(model).eval().requires_grad_(False)


autoload()
