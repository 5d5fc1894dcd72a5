"""Who is measured: the model itself, what can be made of it, and others."""
import enum
import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple

import timm
import torch
import torch.nn as nn
from timm.models import get_pretrained_cfg

from ..layers.attention import Attention
from ..models.fast_itpn import FastITPN
from ..weights.layout import native_depths, native_to_official
from .baseline import Baseline
from .cases import DTYPES, Case, Rivals

__all__ = ['BASELINE', 'NUM_CLASSES', 'OURS', 'Contestant', 'Kind', 'build', 'build_ours', 'checkpoint_gradients']

NUM_CLASSES = 1000
OURS = 'ours'
BASELINE = 'baseline'


class Kind(enum.Enum):
    OURS = enum.auto()  # our model, whatever was made of it: same outputs, same number of operations
    SAME_FUNCTION = enum.auto()  # same weights and outputs, but operations of its own
    OTHER = enum.auto()


class Contestant(NamedTuple):
    """One who is measured.

    Attributes:
        name: Its name in the rows.
        model: The module, as written.
        run: What is called: the module, or what a compiler made of it.
        kind: What it has in common with ours.
    """
    name: str
    model: nn.Module
    run: Callable[[torch.Tensor], torch.Tensor]
    kind: Kind


def build(case: Case, rivals: Rivals, device: str) -> List[Contestant]:
    """Build all contestants of a case, ours first.

    Raises:
        ValueError: A rival cannot be built, or not for this case.
    """
    ours = build_ours(case)
    others: Dict[str, nn.Module] = {}
    if rivals.baseline:
        others[BASELINE] = build_baseline(ours, case)
    others.update({name: build_peer(name, case.size) for name in rivals.peers})
    if rivals.against:
        others[rivals.against] = build_against(rivals.against, case.size)
    dtype = getattr(torch, DTYPES[case.dtype][0])
    for model in (ours, *others.values()):
        model.to(device, dtype).train(case.mode == 'train')

    contestants = [Contestant(OURS, ours, ours, Kind.OURS)]
    if rivals.fuse:
        from ..models.fusion import fuse

        fused = fuse(ours)  # now, because what it does depends on device and type
        contestants.append(Contestant(f'{OURS} fused', fused, fused, Kind.OURS))
    if rivals.compile:
        contestants += [
            c._replace(name=f'{c.name} compiled ({rivals.compile})', run=compile_model(c.model, rivals.compile))
            for c in contestants]
    kinds = {BASELINE: Kind.SAME_FUNCTION}
    contestants += [Contestant(name, model, model, kinds.get(name, Kind.OTHER)) for name, model in others.items()]
    return contestants


def build_ours(case: Case) -> nn.Module:
    """The model of a case with random weights, in float32 on the CPU.

    Each layer keeps the size of its input about, so that an error in any of them shows in the output.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model: nn.Module = timm.create_model(case.model, img_size=case.size, num_classes=NUM_CLASSES)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def build_baseline(ours: nn.Module, case: Case) -> nn.Module:
    if not isinstance(ours, FastITPN):
        raise ValueError(f'{case.model} has no baseline: only the models named fast_itpn_* have')
    state = ours.state_dict()
    baseline = Baseline(
        img_size=(case.size, case.size),
        num_classes=NUM_CLASSES,
        embed_dim=ours.embed_dim,
        depths=native_depths(state),
        num_heads=next(module.num_heads for module in ours.modules() if isinstance(module, Attention)),
    )
    baseline.load_state_dict(native_to_official(state))
    return baseline


def build_peer(name: str, size: int) -> nn.Module:
    """A model of timm with random weights for images of size x size."""
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}: look it up with timm.list_models('*{name.partition('_')[0]}*')")
    cfg = get_pretrained_cfg(name)
    options: Dict[str, Any] = {'num_classes': NUM_CLASSES}
    if cfg is not None and cfg.input_size[1:] != (size, size):
        options['img_size'] = size
    try:
        peer: nn.Module = timm.create_model(name, **options)
        with torch.no_grad():
            peer.eval()(torch.zeros(1, 3, size, size))
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f'{name} cannot take images of {size} x {size} pixels: {error}') from error
    patch_size = getattr(getattr(peer, 'patch_embed', None), 'patch_size', (1, 1))
    if size % patch_size[0]:
        raise ValueError(
            f'{name} cannot take images of {size} x {size} pixels: it has patches of {patch_size[0]}, and would see '
            'only a part')
    return peer


def build_against(place: str, size: int) -> nn.Module:
    """Call the function of a user's file that builds a module.

    Args:
        place: FILE:FUNCTION. The function gets those of `img_size=(height, width)` and `num_classes=` that it takes.
        size: Side of the images in pixels.
    """
    file, _, function = place.rpartition(':')
    if not file or not function:
        raise ValueError(f'--against {place}: give FILE:FUNCTION, such as my_model.py:build')
    if not Path(file).is_file():
        raise ValueError(f'--against {place}: there is no file {file}')
    try:
        build_module = getattr(load_file(Path(file).resolve()), function, None)
    except Exception as error:  # whatever the file does
        raise ValueError(f'--against {place}: {file} cannot be run: {type(error).__name__}: {error}') from error
    if not callable(build_module):
        raise ValueError(f'--against {place}: {file} has no function {function}')
    module = build_module(**accepted(build_module, img_size=(size, size), num_classes=NUM_CLASSES))
    if not isinstance(module, nn.Module):
        raise ValueError(f'--against {place}: {function} returned {type(module).__name__}, not a torch.nn.Module')
    return module


def load_file(path: Path) -> Any:
    """Run a Python file as a module; it may import its neighbours."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError('its name does not end in .py')
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def accepted(function: Callable[..., Any], **offered: Any) -> Dict[str, Any]:
    """Those of the arguments that the function takes by name."""
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return offered
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name: value for name, value in offered.items()
            if name in parameters and parameters[name].kind in by_name}


def checkpoint_gradients(contestants: List[Contestant]) -> None:
    """Let all recompute activations in the backward pass."""
    for contestant in contestants:
        enable: Any = getattr(contestant.model, 'set_grad_checkpointing', None)
        if enable is None:
            raise ValueError(f'{contestant.name} has no set_grad_checkpointing(): leave out gradient checkpointing')
        enable()


def compile_model(model: nn.Module, mode: str) -> Callable[[torch.Tensor], torch.Tensor]:
    compiled = torch.compile(model, mode=mode)

    def run(images: torch.Tensor) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # outputs of the last call may be overwritten
        out: torch.Tensor = compiled(images)
        return out
    return run
