"""Who is measured: the model itself, what can be made of it, and others."""
import copy
import enum
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn as nn
from timm.models import get_pretrained_cfg

from ..layers.attention import Attention
from ..models._timm import FeatureGetterNet
from ..models.fusion import fuse
from ..pretrain.masking import MASKINGS
from ..pretrain.objectives import OBJECTIVES, create_objective, create_student
from ..weights.layout import PYRAMID, native_depths, native_to_official
from .baseline import Baseline
from .cases import DTYPES, Case, Rivals, Size, height_width

__all__ = ['BASELINE', 'NUM_CLASSES', 'OURS', 'Contestant', 'Kind', 'build', 'build_ours', 'checkpoint_gradients']

NUM_CLASSES = 1000
TEACHER_DIM = 512  # of OpenAI's ViT-B
OURS = 'ours'
BASELINE = 'baseline'


class Kind(enum.Enum):
    SAME_FUNCTION = enum.auto()  # same weights and outputs as ours
    ACCELERATED = enum.auto()  # same weights, other outputs by design
    OTHER = enum.auto()


class Contestant(NamedTuple):
    """One who is measured.

    Attributes:
        name: Its name in the rows.
        model: The module, as written.
        run: What is called: the module, or what a compiler made of it.
        kind: What it has in common with ours.
        plain: The module whose operations it has: layers that are fused cannot be counted.
    """
    name: str
    model: nn.Module
    run: Callable[[torch.Tensor], Any]
    kind: Kind
    plain: nn.Module


class PretrainingStep(nn.Module):
    """The loss of an objective for images (B, 3, H, W), as a list of one tensor. Masks and teacher's tokens are fixed.

    Args:
        case: Model, size and batch.
        name: Key of `OBJECTIVES`.
    """

    def __init__(self, case: Case, name: str):
        super().__init__()
        side, _ = height_width(case.size)
        student = create_student(case.model, name, side)
        teacher_dim = TEACHER_DIM if OBJECTIVES[name].TEACHER else None
        self.objective = objective = create_objective(name, student, teacher_dim=teacher_dim)
        generator = torch.Generator().manual_seed(0)
        masking = MASKINGS[objective.MASKING]
        masked = torch.stack([
            masking(objective.grid_size, objective.num_masked, generator) for _ in range(case.batch)])
        self.register_buffer('masked', masked)
        target = torch.randn(case.batch, masked[0].numel(), TEACHER_DIM, generator=generator)
        self.register_buffer('target', target if teacher_dim else None)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.objective.backbone.set_grad_checkpointing(enable)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [self.objective(images, self.masked, self.target)['loss']]


def build(case: Case, rivals: Rivals, device: str) -> list[Contestant]:
    """Build all contestants of a case, ours first.

    Raises:
        ValueError: A rival cannot be built, or not for this case.
    """
    ours = build_ours(case)
    accelerated = {f'{OURS} {name}': build_accelerated(ours, case, name) for name in rivals.accelerations}
    others: dict[str, nn.Module] = {}
    if rivals.baseline:
        others[BASELINE] = build_baseline(ours, case)
    others.update({name: build_peer(name, case.size) for name in rivals.peers})
    if rivals.against:
        others[rivals.against] = build_against(rivals.against, case.size)
    if rivals.objective:
        others[f'{OURS} pre-training ({rivals.objective})'] = PretrainingStep(case, rivals.objective)
    dtype = getattr(torch, DTYPES[case.dtype][0])
    for model in (ours, *accelerated.values(), *others.values()):
        model.to(device, dtype).train(case.mode == 'train')

    contestants = as_written_and_fused(OURS, ours, Kind.SAME_FUNCTION, rivals.fuse)
    for name, model in accelerated.items():
        contestants += as_written_and_fused(name, model, Kind.ACCELERATED, rivals.fuse)
    if rivals.compile:
        contestants += [
            c._replace(name=f'{c.name} compiled ({rivals.compile})', run=compile_model(c.model, rivals.compile))
            for c in contestants]
    kinds = {BASELINE: Kind.SAME_FUNCTION}
    contestants += [
        Contestant(name, model, model, kinds.get(name, Kind.OTHER), plain=model) for name, model in others.items()]
    return contestants


def as_written_and_fused(name: str, model: nn.Module, kind: Kind, with_fused: bool) -> list[Contestant]:
    """A model, and if asked for its fused copy. Do it last: what fusing does depends on device and type."""
    contestants = [Contestant(name, model, model, kind, plain=model)]
    if with_fused:
        fused = fuse(model)
        contestants.append(Contestant(f'{name} fused', fused, fused, kind, plain=model))
    return contestants


def build_ours(case: Case) -> nn.Module:
    """The model of a case with random weights, in float32 on the CPU.

    Each layer keeps the size of its input about, so that an error in any of them shows in the output.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = create(case)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def build_accelerated(ours: nn.Module, case: Case, acceleration: str) -> nn.Module:
    """Ours with token gathering and migration, and the same weights."""
    model = create(case, acceleration)
    model.load_state_dict(ours.state_dict())
    return model


def create(case: Case, acceleration: str | None = None) -> nn.Module:
    """The model of a case as timm makes it: a classifier, or timm's wrapper that returns the levels of the pyramid."""
    options: dict[str, Any] = {'img_size': height_width(case.size), 'acceleration': acceleration}
    if case.pyramid:
        options.update(features_only=True, pyramid=True)
    else:
        options.update(num_classes=NUM_CLASSES)
    model: nn.Module = timm.create_model(case.model, **options)
    return model


def unwrapped(model: nn.Module) -> nn.Module:
    """The model in timm's wrapper for features, or the model itself."""
    inner: nn.Module = model.model if isinstance(model, FeatureGetterNet) else model
    return inner


def build_baseline(ours: nn.Module, case: Case) -> nn.Module:
    model = unwrapped(ours)
    if getattr(model, 'family', '') != 'fast_itpn':
        raise ValueError(f'{case.model} has no baseline: only the models named fast_itpn_* have')
    state = model.state_dict()
    baseline = Baseline(
        img_size=height_width(case.size),
        num_classes=NUM_CLASSES,
        embed_dim=model.embed_dim,
        depths=native_depths(state),
        num_heads=next(module.num_heads for module in model.modules() if isinstance(module, Attention)),
        pyramid=copy.deepcopy(model.pyramid),
    )
    pyramid = {key: value for key, value in state.items() if key.startswith(PYRAMID)}  # it keeps its names
    others = {key: value for key, value in state.items() if key not in pyramid}
    baseline.load_state_dict({**native_to_official(others), **pyramid})
    return baseline


def build_peer(name: str, size: Size) -> nn.Module:
    """A model of timm with random weights for images of a size."""
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}: look it up with timm.list_models('*{name.partition('_')[0]}*')")
    cfg = get_pretrained_cfg(name)
    height, width = height_width(size)
    options: dict[str, Any] = {'num_classes': NUM_CLASSES}
    if cfg is not None and cfg.input_size[1:] != (height, width):
        options['img_size'] = height, width
    try:
        peer: nn.Module = timm.create_model(name, **options)
        with torch.no_grad():
            peer.eval()(torch.zeros(1, 3, height, width))
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f'{name} cannot take images of {height} x {width} pixels: {error}') from error
    patch_size = getattr(getattr(peer, 'patch_embed', None), 'patch_size', (1, 1))
    if height % patch_size[0] or width % patch_size[1]:
        raise ValueError(
            f'{name} cannot take images of {height} x {width} pixels: it has patches of {patch_size[0]}, and would see '
            'only a part')
    return peer


def build_against(place: str, size: Size) -> nn.Module:
    """Call the function of a user's file that builds a module.

    Args:
        place: FILE:FUNCTION. The function gets those of `img_size=(height, width)` and `num_classes=` that it takes.
        size: Of the images.
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
    module = build_module(**accepted(build_module, img_size=height_width(size), num_classes=NUM_CLASSES))
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


def accepted(function: Callable[..., Any], **offered: Any) -> dict[str, Any]:
    """Those of the arguments that the function takes by name."""
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return offered
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name: value for name, value in offered.items()
            if name in parameters and parameters[name].kind in by_name}


def checkpoint_gradients(contestants: list[Contestant]) -> None:
    """Let all recompute activations in the backward pass."""
    for contestant in contestants:
        enable: Any = getattr(unwrapped(contestant.model), 'set_grad_checkpointing', None)
        if enable is None:
            raise ValueError(f'{contestant.name} has no set_grad_checkpointing(): leave out gradient checkpointing')
        enable()


def compile_model(model: nn.Module, mode: str) -> Callable[[torch.Tensor], Any]:
    compiled = torch.compile(model, mode=mode)

    def run(images: torch.Tensor) -> Any:
        torch.compiler.cudagraph_mark_step_begin()  # outputs of the last call may be overwritten
        return compiled(images)
    return run
