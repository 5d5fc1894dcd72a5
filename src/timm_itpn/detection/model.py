"""Mask R-CNN with the authors' settings, from torchvision's parts.

Paper: 'Mask R-CNN', https://arxiv.org/abs/1703.06870; the settings are those of iTPN, https://arxiv.org/abs/2211.12735.

Differs from torchvision's `maskrcnn_resnet50_fpn`: a box head of four convolutions and one layer; the loss of boxes is
generalised IoU of decoded boxes, ten times; RoI align samples every position; anchors are at the exact strides.
"""
from collections import defaultdict
from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from timm.models import group_parameters
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_loss
from torchvision.ops import MultiScaleRoIAlign, generalized_box_iou_loss

from ..engine.task import Losses
from ..models import check_name
from ..models.detection import DetectionBackbone

STRIDES = (4, 8, 16, 32, 64)
ROI_LEVELS = ('0', '1', '2', '3')  # strides 4 to 32
BOX_LOSS_WEIGHT = 10.
PREFIX = 'backbone.body.model.'  # of the names of the backbone's parameters

Target = dict[str, torch.Tensor]


def mask_rcnn(
        model_name: str,
        num_classes: int,
        backbone_kwargs: dict[str, Any] | None = None,
        head_dim: int = 256,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
        **kwargs: Any,
) -> MaskRCNN:
    """Create the detector.

    In training, images come as they are, so the data set resizes them; in evaluation the detector resizes them to a
    short side of 800 pixels and a long side of at most 1333.

    Args:
        model_name: Name of a model with pyramid.
        num_classes: Classes with the background, which is class 0, as torchvision counts them.
        backbone_kwargs: For `DetectionBackbone`, such as `pretrained`, `drop_path_rate`. Relative position bias is off
            unless they say otherwise.
        head_dim: Channels of the convolutions of both heads; the linear layer of the box head has four times as many.
        norm_layer: Norm of the box head. The authors synchronise it: `nn.SyncBatchNorm.convert_sync_batchnorm(model)`,
            for CUDA.
        kwargs: For torchvision's `MaskRCNN`, such as `min_size`, `max_size`, `box_score_thresh`.

    Raises:
        ValueError: There is no class but the background, no such model, or its levels have unequal numbers of channels.
    """
    if num_classes < 2:
        raise ValueError(f'num_classes is {num_classes}, but it counts the background: it is at least 2.')
    if unknown := kwargs.keys() - signature(MaskRCNN.__init__).parameters.keys():  # which torchvision swallows
        raise ValueError(f'The detector has no argument {min(unknown)!r}: see those of MaskRCNN in torchvision.')
    check_name(model_name)
    backbone = DetectionBackbone(model_name, **{'rel_pos_bias': False, **(backbone_kwargs or {})})
    channels = backbone.out_channels
    model = MaskRCNN(
        backbone,
        rpn_anchor_generator=Anchors(),
        box_roi_pool=MultiScaleRoIAlign(ROI_LEVELS, output_size=7, sampling_ratio=0),
        box_head=FastRCNNConvFCHead((channels, 7, 7), [head_dim] * 4, [4 * head_dim], norm_layer),
        box_predictor=FastRCNNPredictor(4 * head_dim, num_classes),
        mask_roi_pool=MultiScaleRoIAlign(ROI_LEVELS, output_size=14, sampling_ratio=0),
        mask_head=MaskRCNNHeads(channels, (head_dim,) * 4, dilation=1),
        mask_predictor=MaskRCNNPredictor(head_dim, head_dim, num_classes),
        _skip_resize=True,  # in training
        **{'rpn_post_nms_top_n_train': 1000, **kwargs},
    )
    model.roi_heads = BoxAndMaskHeads(model.roi_heads)
    for part in (model.rpn, model.roi_heads):
        part.fg_bg_sampler = SeededSampler(part.fg_bg_sampler)
    model.register_forward_pre_hook(_seed_samplers, with_kwargs=True)
    predictor = model.roi_heads.box_predictor
    for layer in (model.rpn.head.cls_logits, model.rpn.head.bbox_pred, predictor.cls_score, predictor.bbox_pred):
        layer.register_forward_hook(_in_float32)
    return model


def compute_losses(model: nn.Module, images: list[torch.Tensor], targets: list[Target]) -> Losses:
    """'loss' of a batch, and the terms that it is the sum of.

    Args:
        model: The detector in training mode, or what wraps it, such as `DistributedDataParallel`.
        images: (3, H, W) each, 0 to 1.
        targets: Of each image 'boxes' (N, 4), 'labels' (N,) and 'masks' (N, H, W), as torchvision takes them.
    """
    terms = model(images, targets)
    return {'loss': torch.stack(list(terms.values())).sum(), **terms}


def param_groups(
        model: nn.Module, weight_decay: float = 0.05, layer_decay: float = 0.9) -> list[dict[str, Any]]:
    """Groups for an optimizer, with the authors' layer decay; `lr_scale` is what timm's schedules multiply the rate by.

    Patch embed and positions are layer 0, blocks and merges 1, 2, ... in their order, all else is the last layer, L.
    Layer i learns at `layer_decay` ** (L - i) of the rate. As in the authors' settings L is 1 + the number of blocks
    (31 for base, 45 for large), without the two merges, so the last block has the rate of the heads divided by
    `layer_decay`, the one before it their rate.

    Args:
        model: Detector whose backbone is a `DetectionBackbone`.
        weight_decay: Of all but 1-D parameters (so biases and norms), absolute positions and relative position tables.
        layer_decay: Of the learning rate, per layer.

    Raises:
        ValueError: The backbone is another.
    """
    if not isinstance(getattr(model, 'backbone', None), DetectionBackbone):
        raise ValueError('Layer decay needs a detector whose backbone is a DetectionBackbone, as mask_rcnn makes it.')
    body: Any = model.get_submodule(PREFIX.strip('.'))
    layers = group_parameters(body, body.group_matcher(), reverse=True)
    last = 1 + sum(len(stage.blocks) for stage in body.stages)
    not_decayed = body.no_weight_decay()
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for full_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = full_name.removeprefix(PREFIX)
            layer = layers[name] if name in layers and not name.startswith('pyramid.') else last
            decay = 0. if parameter.ndim <= 1 or name in not_decayed else weight_decay
            groups[layer_decay ** (last - layer), decay].append(parameter)
    return [
        dict(params=params, lr_scale=scale, weight_decay=decay) for (scale, decay), params in groups.items()]


class Anchors(AnchorGenerator):
    """Anchors of eight strides, of three shapes, at the exact strides and in float32.

    torchvision's own are image side // map side apart, 61 pixels at stride 64 of 800; and of the type of the levels,
    which under autocast knows only every fourth pixel (bfloat16 from 512).
    """

    def __init__(self) -> None:
        super().__init__(tuple((8 * stride,) for stride in STRIDES), ((0.5, 1., 2.),) * len(STRIDES))

    def forward(self, image_list: ImageList, feature_maps: list[torch.Tensor]) -> list[torch.Tensor]:
        """Anchors (N, 4) of each image, level by level."""
        self.set_cell_anchors(torch.float32, feature_maps[0].device)
        sizes = [level.shape[-2:] for level in feature_maps]
        anchors = torch.cat(self.grid_anchors(sizes, [[stride, stride] for stride in STRIDES]))
        return [anchors] * len(image_list.image_sizes)


class BoxAndMaskHeads(RoIHeads):
    """torchvision's heads with the generalised IoU of decoded boxes as their loss of boxes.

    Args:
        heads: What to take the parts and settings of.
    """

    def __init__(self, heads: RoIHeads):
        nn.Module.__init__(self)
        self.__dict__.update(heads.__dict__)

    def forward(
            self,
            features: dict[str, torch.Tensor],
            proposals: list[torch.Tensor],
            image_shapes: list[tuple[int, int]],
            targets: list[Target] | None = None,
    ) -> tuple[list[Target], Losses]:
        """As torchvision's: predictions in evaluation, losses in training."""
        if not self.training:
            return super().forward(features, proposals, image_shapes, targets)
        assert targets is not None
        proposals, matched, labels, _ = self.select_training_samples(proposals, targets)
        x = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        logits, deltas = self.box_predictor(x)
        boxes = self.box_coder.decode(deltas, proposals)  # (N, num_classes * 4) -> (N, num_classes, 4)
        all_labels = torch.cat(labels)
        chosen = all_labels.nonzero()[:, 0]  # objects
        num_samples, num_objects = _of_all_processes(all_labels.new_tensor([len(all_labels), len(chosen)]))

        proposals = [each[label > 0] for each, label in zip(proposals, labels)]
        matched = [index[label > 0] for index, label in zip(matched, labels)]
        wanted = torch.cat([target['boxes'][index] for target, index in zip(targets, matched)])
        box_loss = generalized_box_iou_loss(boxes[chosen, all_labels[chosen]], wanted, reduction='sum')
        mask_logits = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, proposals, image_shapes)))
        masks, classes = [target['masks'] for target in targets], [target['labels'] for target in targets]
        return [], {
            'loss_classifier': nn.functional.cross_entropy(logits, all_labels, reduction='sum') / num_samples,
            'loss_box_reg': BOX_LOSS_WEIGHT * box_loss / num_samples,
            'loss_mask': maskrcnn_loss(mask_logits, proposals, masks, classes, matched) * len(chosen) / num_objects,
        }


class SeededSampler:
    """As torchvision's sampler, but what it draws for an image follows from a seed, not from the rest of the batch.

    Args:
        sampler: What to take the numbers of.

    Attributes:
        seeds: Of the images of a batch.
    """

    def __init__(self, sampler: Any):
        self.batch_size_per_image: int = sampler.batch_size_per_image
        self.positive_fraction: float = sampler.positive_fraction
        self.seeds: list[int] = []

    def __call__(self, matched_idxs: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Masks of the positives and of the negatives that are drawn for each image."""
        drawn: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for seed, labels in zip(self.seeds, matched_idxs):
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
            positive = order[labels[order] >= 1][:int(self.batch_size_per_image * self.positive_fraction)]
            negative = order[labels[order] == 0][:self.batch_size_per_image - len(positive)]
            for chosen, masks in zip((positive, negative), drawn):
                masks.append(torch.zeros_like(labels, dtype=torch.uint8).index_fill(0, chosen, 1))
        return drawn


def _seed_samplers(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: seeds of the images, random ones for targets that have none."""
    targets = kwargs.get('targets', args[1] if len(args) > 1 else None)
    seeds = [int(target['seed']) if 'seed' in target else int(torch.randint(2 ** 62, ())) for target in targets or ()]
    model.rpn.fg_bg_sampler.seeds = model.roi_heads.fg_bg_sampler.seeds = seeds


def _of_all_processes(counts: torch.Tensor) -> list[float]:
    """Counts as means over all processes, so that losses do not depend on how images are dealt; at least 1."""
    means = counts.float()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(means)
        means /= dist.get_world_size()
    return means.clamp(min=1).tolist()


def _in_float32(layer: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    """Forward hook: under autocast, boxes and scores are computed in float32."""
    return output.float() if torch.is_autocast_enabled(output.device.type) else output
