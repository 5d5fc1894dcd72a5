"""Layer decay over the detector."""
import pytest
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2

from timm_itpn.detection.model import mask_rcnn
from timm_itpn.detection.optim import param_groups


def scales(model, **kwargs):
    """Name -> (factor on the learning rate, weight decay)."""
    found = {id(p): (group['lr_scale'], group['weight_decay']) for group in param_groups(model, **kwargs)
             for p in group['params']}
    return {name: found.pop(id(p)) for name, p in model.named_parameters()}


@pytest.mark.parametrize('name, layer_decay, depths, layers', [
    ('itpn_base_fpn', 0.9, (3, 3, 24), 30),
    ('itpn_large_fpn', 0.95, (2, 2, 40), 44),
])
def test_scales_are_the_authors(name, layer_decay, depths, layers):
    kwargs = dict(embed_dim=64, num_heads=1, depths=depths, pyramid_dim=8, rel_pos_bias=True)
    scale = scales(mask_rcnn(name, 2, kwargs, head_dim=8), layer_decay=layer_decay)
    flat: list[str] = []
    for stage, depth in enumerate(depths):
        flat += [f'stages.{stage}.downsample.'] * (stage > 0) + [f'stages.{stage}.blocks.{i}.' for i in range(depth)]
    assert len(flat) == layers + 2  # the authors count no merges
    for i, start in enumerate(flat):
        chosen = {value[0] for key, value in scale.items() if key.startswith(f'backbone.body.model.{start}')}
        assert [*chosen] == [pytest.approx(layer_decay ** (layers + 1 - (i + 1)))], start
    rest = {key: value for key, value in scale.items() if '.stages.' not in key and '.patch_embed.' not in key}
    assert {key.split('.')[3] if key.startswith('backbone') else key.split('.')[0] for key in rest} == {
        'pyramid', 'rpn', 'roi_heads'}
    assert {value[0] for value in rest.values()} == {1.}
    for key in ('patch_embed.proj.weight', 'stages.2.pos_embed'):
        assert scale[f'backbone.body.model.{key}'][0] == pytest.approx(layer_decay ** (layers + 1))
    undecayed = {key for key, value in scale.items() if value[1] == 0}
    model = mask_rcnn(name, 2, kwargs, head_dim=8)
    assert undecayed == {
        key for key, p in model.named_parameters()
        if p.ndim == 1 or key.endswith(('bias', 'pos_embed', 'relative_position_bias_table'))}
    assert {value[1] for value in scale.values()} == {0., 0.05}


def test_rates_follow_the_schedule_of_timm():
    model = mask_rcnn('fast_itpn_tiny_fpn', 2, dict(embed_dim=64, depths=(1, 1, 2), num_heads=1), head_dim=8)
    model.rpn.requires_grad_(False)
    optimizer = create_optimizer_v2(model, opt='adamw', lr=1e-3, param_group_fn=param_groups)
    assert isinstance(optimizer, torch.optim.AdamW)
    trained = {id(p) for group in optimizer.param_groups for p in group['params']}
    assert not trained & set(map(id, model.rpn.parameters()))
    scheduler, _ = create_scheduler_v2(optimizer, 'multistep', decay_milestones=[9, 11], decay_rate=0.1)
    for epoch, factor in ((0, 1), (9, 0.1), (11, 0.01)):
        scheduler.step(epoch)
        for group in optimizer.param_groups:
            assert group['lr'] == pytest.approx(1e-3 * factor * group['lr_scale'])


def test_other_backbones_are_refused():
    with pytest.raises(ValueError, match='whose backbone is a DetectionBackbone, as mask_rcnn makes it'):
        param_groups(torch.nn.ModuleDict(dict(backbone=torch.nn.Linear(2, 2))))
