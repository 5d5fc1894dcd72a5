"""What is measured: the model itself, what can be made of it, and other models."""
import copy
import enum
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
import torch.nn as nn
from timm.models import get_pretrained_cfg

from .. import fuse
from ..acceleration.schedule import parse_schedule
from ..pretrain.masking import MASKINGS
from ..pretrain.objectives import OBJECTIVES, create_objective, create_student
from ..tracking import JointEncoder
from ..weights.layout import PYRAMID, native_depths, native_to_official
from .baseline import Baseline, JointBaseline
from .cases import DTYPES, Candidates, Case
from .flops import Outputs

__all__ = ['BASELINE', 'NUM_CLASSES', 'OURS', 'Candidate', 'Kind', 'build', 'build_ours']

NUM_CLASSES = 1000
OURS = 'ours'
BASELINE = 'baseline'

_TEACHER_DIM = 512  # of OpenAI's ViT-B


class Kind(enum.Enum):
    SAME_FUNCTION = enum.auto()  # same weights and outputs as ours
    ACCELERATED = enum.auto()  # same weights, other outputs by design
    OTHER = enum.auto()


@dataclass(frozen=True)
class Candidate:
    """A model that is measured."""
    name: str  # in the rows
    model: nn.Module  # as written
    run: Callable[[torch.Tensor], Outputs]  # what is called: the module, or what a compiler made of it
    kind: Kind
    plain: nn.Module  # what operations are counted of: those of fused layers cannot be


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
        masking = MASKINGS[self.objective.MASKING]
        masked = torch.stack([
            masking(self.objective.grid_size, self.objective.num_masked, generator) for _ in range(case.batch)])
        self.register_buffer('masked', masked)
        target = torch.randn(case.batch, masked[0].numel(), _TEACHER_DIM, generator=generator)
        self.register_buffer('target', target if teacher_dim else None)

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
        self.kept: torch.Tensor = nn.Buffer(templates, persistent=False)

    @torch.no_grad()
    def train(self, mode: bool = True) -> 'Frame':
        super().train(mode)
        if not mode:
            self.kept = self.encoder.embed(self.templates, 'template')
        return self

    def forward(self, search: torch.Tensor) -> list[torch.Tensor]:
        template = self.templates if self.training else self.kept
        return [self.encoder(dict(search=search, template=template))[1]['search']]


def build(case: Case, asked: Candidates, device: str) -> list[Candidate]:
    """Build all candidates of a case, ours first.

    Raises:
        ValueError: A candidate cannot be built, or not for this case.
    """
    against = _build_against(asked.against, case.img_size) if asked.against else None
    ours = build_ours(case)
    plain = {OURS: (ours, Kind.SAME_FUNCTION)}
    for name in asked.accelerations:
        accelerated = _create(case, name)
        accelerated.load_state_dict(ours.state_dict())
        plain[f'{OURS} {name}'] = accelerated, Kind.ACCELERATED
    others: dict[str, tuple[nn.Module, Kind]] = {}
    if asked.baseline:
        others[BASELINE] = _build_baseline(ours, case), Kind.SAME_FUNCTION
    for name in asked.peers:
        others[name] = _build_peer(name, case.img_size), Kind.OTHER
    if against is not None:
        others[asked.against] = against, Kind.OTHER
    if asked.objective:
        others[f'{OURS} pre-training ({asked.objective})'] = PretrainingStep(case, asked.objective), Kind.OTHER
    dtype = getattr(torch, DTYPES[case.dtype][0])
    for model, _ in (*plain.values(), *others.values()):
        model.to(device, dtype).train(case.mode == 'train')

    candidates = []
    for name, (model, kind) in plain.items():
        candidates.append(Candidate(name, model, model, kind, plain=model))
        if asked.fuse:  # last: what fusing does depends on device and type
            fused = fuse(model)
            candidates.append(Candidate(f'{name} fused', fused, fused, kind, plain=model))
    if asked.compile:
        candidates += [
            replace(c, name=f'{c.name} compiled ({asked.compile})', run=_compiled(c.model, asked.compile))
            for c in candidates]
    if asked.onnx:
        candidates.append(replace(candidates[0], name=f'{OURS} ONNX', run=_in_onnx(ours, case)))
    return candidates + [Candidate(name, model, model, kind, plain=model) for name, (model, kind) in others.items()]


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


def _unwrapped(model: nn.Module) -> Any:
    """The model in timm's wrapper for features, or the model itself."""
    return getattr(model, 'model', model)


def _build_baseline(ours: nn.Module, case: Case) -> nn.Module:
    model = getattr(ours, 'encoder', None) or _unwrapped(ours)
    state = model.state_dict()
    sizes: dict[str, Any] = dict(
        img_size=case.img_size,
        num_classes=NUM_CLASSES,
        embed_dim=model.embed_dim,
        depths=native_depths(state),
        num_heads=model.stages[2].blocks[0].attn.num_heads,
    )
    if isinstance(ours, Frame):
        joint = JointBaseline(ours.templates, **sizes)
        joint.load_state_dict(ours.encoder.official_state_dict())
        return joint
    baseline = Baseline(pyramid=copy.deepcopy(model.pyramid), **sizes)
    pyramid = {key: value for key, value in state.items() if key.startswith(PYRAMID)}  # it keeps its names
    others = {key: value for key, value in state.items() if key not in pyramid}
    baseline.load_state_dict({**native_to_official(others), **pyramid})
    return baseline


def _build_peer(name: str, img_size: tuple[int, int]) -> nn.Module:
    """A model of timm with random weights for images of a size."""
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}: look it up with timm.list_models('*{name.partition('_')[0]}*')")
    cfg = get_pretrained_cfg(name)
    own_size = cfg is not None and cfg.input_size[1:] == img_size
    height, width = img_size
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


def _compiled(model: nn.Module, mode: str) -> Callable[[torch.Tensor], Outputs]:
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
    with TemporaryDirectory() as folder:
        path = f'{folder}/model.onnx'
        torch.onnx.export(model, (torch.zeros(case.batch, 3, *case.img_size),), path, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    name = session.get_inputs()[0].name
    return lambda images: [torch.from_numpy(output) for output in session.run(None, {name: images.numpy()})]
