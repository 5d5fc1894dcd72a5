"""What is measured: the model itself, what can be made of it, and other models."""
import copy
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
from timm.models import get_pretrained_cfg

from .. import fuse
from ..acceleration.schedule import parse_schedule
from ..pretrain.objectives import OBJECTIVES, create_objective, create_student
from ..tracking import JointEncoder
from ..weights.layout import PYRAMID, native_depths, native_to_official
from .baseline import Baseline
from .cases import Asked, Case
from .flops import Outputs

NUM_CLASSES = 1000
OURS = 'ours'
BASELINE = 'baseline'

_TEACHER_DIM = 512  # of OpenAI's ViT-B


@dataclass(frozen=True)
class Candidate:
    """What is measured."""
    name: str  # in the rows
    model: nn.Module  # as written: operations of fused layers cannot be counted
    run: Callable[[torch.Tensor], Outputs]  # what is called: the model, fused, or what a compiler made of it
    same_weights: bool = True  # as ours
    same_function: bool = True  # outputs have to agree with ours; those of an accelerated model do not


class PretrainingStep(nn.Module):
    """The loss of an objective for images (B, 3, H, W), as a list of one tensor. Masks and teacher's tokens are fixed.

    Args:
        case: Model, size and batch.
        name: Key of `OBJECTIVES`.
    """

    def __init__(self, case: Case, name: str):
        super().__init__()
        teacher_dim = _TEACHER_DIM if OBJECTIVES[name].TEACHER else None
        student = create_student(case.model, name, case.img_size[0])
        self.objective: Any = create_objective(name, student, teacher_dim=teacher_dim)
        generator = torch.Generator().manual_seed(0)
        height, width = self.objective.grid_size
        order = torch.rand(case.batch, height * width, generator=generator).argsort(dim=1)
        self.masked = nn.Buffer((order < self.objective.num_masked).reshape(case.batch, height, width))
        target = torch.randn(case.batch, height * width, _TEACHER_DIM, generator=generator)
        self.target = nn.Buffer(target) if teacher_dim else None

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [self.objective(images, self.masked, self.target)['loss']]


class Frame(nn.Module):
    """What a tracker encodes for each frame, (B, 3, H, W) -> [map (B, C, H/16, W/16)]; the templates' tokens are kept.

    Args:
        encoder: Of roles 'search' and 'template'.
        templates: (B, n, 3, H, W).
    """

    def __init__(self, encoder: JointEncoder, templates: torch.Tensor):
        super().__init__()
        self.encoder = encoder
        self.templates = nn.Buffer(templates, persistent=False)

    @torch.no_grad()
    def train(self, mode: bool = True) -> 'Frame':
        super().train(mode)
        if not mode:
            self.kept = nn.Buffer(self.encoder.embed(self.templates, 'template'), persistent=False)
        return self

    def forward(self, search: torch.Tensor) -> list[torch.Tensor]:
        template = self.templates if self.training else self.kept
        return [self.encoder(dict(search=search, template=template))[1]['search']]


def build(case: Case, asked: Asked) -> list[Candidate]:
    """Build all candidates of a case, ours first.

    Raises:
        ValueError: A candidate cannot be built, or not for this case.
    """
    ours = build_ours(case)
    forms = [Candidate(OURS, ours, ours)]
    for name in asked.acceleration:
        accelerated = _create(case, name)
        accelerated.load_state_dict(ours.state_dict())
        forms.append(Candidate(f'{OURS} {name}', accelerated, accelerated, same_function=False))
    beside = []
    if asked.baseline:
        baseline = _build_baseline(ours, case)
        beside.append(Candidate(BASELINE, baseline, baseline))
    others = {name: _build_peer(name, case.img_size) for name in asked.peers}
    if asked.against:
        others[asked.against] = _build_against(asked.against, case.img_size)
    if asked.objective:
        others[f'{OURS} pre-training ({asked.objective})'] = PretrainingStep(case, asked.objective)
    beside += [Candidate(name, model, model, False, False) for name, model in others.items()]
    dtype = getattr(torch, case.weight_dtype)
    for c in (*forms, *beside):
        c.model.to(asked.device, dtype).train(case.mode == 'train')

    if asked.fuse:  # only now: what fusing does depends on device and type
        forms = [form for c in forms for form in (c, replace(c, name=f'{c.name} fused', run=fuse(c.model)))]
    if asked.compile:
        forms += [
            replace(c, name=f'{c.name} compiled ({asked.compile})', run=_compiled(c.run, asked.compile)) for c in forms]
    if asked.onnx:
        forms.append(replace(forms[0], name=f'{OURS} ONNX', run=_in_onnx(ours, case)))
    return forms + beside


def build_ours(case: Case) -> nn.Module:
    """The model of a case with random weights, in float32 on the CPU.

    Each layer roughly keeps the size of its input, so that an error in any of them shows in the output.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = _create(case)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def _create(case: Case, acceleration: str | None = None) -> nn.Module:
    """The model of a case as timm makes it: a classifier, or timm's wrapper that returns the levels of the pyramid."""
    output: dict[str, Any] = dict(features_only=True, pyramid=True) if case.pyramid else dict(num_classes=NUM_CLASSES)
    if not case.templates:
        return timm.create_model(case.model, img_size=case.img_size, acceleration=acceleration, **output)
    model: Any = timm.create_model(case.model, img_size=case.img_size, num_classes=0)
    roles = dict(search=case.img_size, template=(case.img_size[0] // 2, case.img_size[1] // 2))
    schedule = parse_schedule(len(model.stages[2].blocks), acceleration)
    encoder = JointEncoder(model, roles, migrate=dict(enumerate(schedule.migrate)) if schedule else None)
    generator = torch.Generator().manual_seed(2)
    return Frame(encoder, torch.randn(case.batch, case.templates, 3, *roles['template'], generator=generator))


def _build_baseline(ours: nn.Module, case: Case) -> nn.Module:
    """The baseline with the weights of our model, of timm's wrapper for features, or of a tracker's encoder."""
    model: Any = getattr(ours, 'encoder' if case.templates else 'model', ours)
    state = model.state_dict()
    sizes: dict[str, Any] = dict(
        img_size=case.img_size,
        num_classes=NUM_CLASSES,
        embed_dim=model.embed_dim,
        depths=native_depths(state),
        num_heads=model.stages[2].blocks[0].attn.num_heads,
    )
    if isinstance(ours, Frame):
        baseline = Baseline(templates=ours.templates, **sizes)
        baseline.load_state_dict(ours.encoder.official_state_dict())
        return baseline
    baseline = Baseline(pyramid=copy.deepcopy(model.pyramid), **sizes)
    pyramid = {key: value for key, value in state.items() if key.startswith(PYRAMID)}  # it keeps its names
    others = {key: value for key, value in state.items() if key not in pyramid}
    baseline.load_state_dict({**native_to_official(others), **pyramid})
    return baseline


def _build_peer(name: str, img_size: tuple[int, int]) -> nn.Module:
    """A model of timm with random weights for images of a size."""
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}: look it up with timm.list_models('*{name.partition('_')[0]}*')")
    height, width = img_size
    cfg = get_pretrained_cfg(name)
    own_size = cfg is not None and cfg.input_size[1:] == img_size
    options: dict[str, Any] = {} if own_size else {'img_size': img_size}
    try:
        peer = timm.create_model(name, num_classes=NUM_CLASSES, **options)
        with torch.no_grad():
            peer.eval()(torch.zeros(1, 3, height, width))
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f'{name} cannot take images of {height} x {width} pixels: {error}') from error
    patch_size = getattr(getattr(peer, 'patch_embed', None), 'patch_size', (1, 1))
    if height % patch_size[0] or width % patch_size[1]:
        raise ValueError(
            f'{name} cannot take images of {height} x {width} pixels: its patches of {patch_size[0]} would leave out '
            'the border')
    return peer


def _build_against(source: str, img_size: tuple[int, int]) -> nn.Module:
    """Call the function of a user's file that builds a module, with `img_size=(height, width)` and `num_classes=`.

    Args:
        source: FILE:FUNCTION.
        img_size: (height, width).
    """
    file, _, function = source.rpartition(':')
    if not Path(file).is_file():
        raise ValueError(f'--against {source}: no file {file!r}; give FILE:FUNCTION, such as my_model.py:build')
    sys.path.append(str(Path(file).resolve().parent))  # the file may import its neighbours, also when its module runs
    try:
        module = runpy.run_path(file)[function](img_size=img_size, num_classes=NUM_CLASSES)
        if not isinstance(module, nn.Module):
            raise TypeError(f'{function} returned {type(module).__name__}, not a torch.nn.Module')
    except Exception as error:  # whatever the file does
        raise ValueError(f'--against {source} cannot be built: {type(error).__name__}: {error}') from error
    return module


def _compiled(model: Callable[[torch.Tensor], Outputs], mode: str) -> Callable[[torch.Tensor], Outputs]:
    compiled = torch.compile(model, mode=mode)

    def run(images: torch.Tensor) -> Outputs:
        torch.compiler.cudagraph_mark_step_begin()  # outputs of the last call may be overwritten
        return compiled(images)
    return run


def _in_onnx(model: nn.Module, case: Case) -> Callable[[torch.Tensor], Outputs]:
    """The model in ONNX Runtime, with as many threads as PyTorch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    images = torch.zeros(case.batch, 3, *case.img_size)
    program: Any = torch.onnx.export(model, (images,), dynamo=True, verbose=False)
    program.initialize_inference_session(
        lambda file: onnxruntime.InferenceSession(file, options, providers=['CPUExecutionProvider']))
    return program
