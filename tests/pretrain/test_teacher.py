"""Teachers."""
import pytest
import timm
import torch
import torch.nn.functional as F
from support.pretrain_runs import TEACHER, teacher_file

from timm_itpn.pretrain.teacher import Teacher, create_teacher


def small_clip(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, img_size=64, embed_dim=64, depth=2, num_heads=2, **kwargs).eval()


def test_tokens_are_those_after_norm_and_projection():
    model = small_clip('vit_base_patch16_clip_224.openai', num_classes=24)
    teacher = Teacher(model, (64, 64))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        tokens = model.forward_features(x)[:, 1:] @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(teacher(x), F.layer_norm(tokens, (24,)))
    assert teacher.dim == 24 and teacher(x).shape == (2, 16, 24)


@pytest.mark.parametrize(('name', 'dim'), [
    ('vit_base_patch16_siglip_224', 64), ('eva02_base_patch16_clip_224', 512), ('vit_base_patch16_224', 64),
    ('vit_base_patch16_clip_224.openai_ft_in1k', 64)])
def test_other_towers_give_tokens(name, dim):
    teacher = Teacher(small_clip(name), (64, 64))
    assert teacher(torch.randn(2, 3, 64, 64)).shape == (2, 16, dim) and teacher.dim == dim


def test_size_follows_from_the_grid_of_the_student(tmp_path):
    path = teacher_file(tmp_path)
    teacher = create_teacher(TEACHER, (4, 6), checkpoint_path=str(path))
    assert teacher.img_size == (64, 96)
    assert teacher(torch.randn(1, 3, 64, 96)).shape[:2] == (1, 24)


def test_wrong_size_names_the_right_one(tmp_path):
    with pytest.raises(ValueError, match='6 x 6 tokens at 96 x 96 pixels, the student 4 x 4: use .*-size 64'):
        create_teacher(TEACHER, (4, 4), img_size=96, checkpoint_path=str(teacher_file(tmp_path)))


def test_teachers_take_no_memory_for_gradients_and_never_train():
    teacher = Teacher(small_clip('vit_base_patch16_clip_224'), (64, 64)).train()
    assert not teacher.training and not teacher.model.training
    assert not any(p.requires_grad for p in teacher.parameters())
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x), lambda x: x):
        output = teacher(torch.randn(2, 3, 64, 64, requires_grad=True))
    assert not kept and not output.requires_grad


def test_low_precision_teachers_give_float32():
    teacher = Teacher(small_clip('vit_base_patch16_clip_224'), (64, 64))
    x = torch.randn(2, 3, 64, 64)
    exact = teacher(x)
    low = teacher.to(torch.bfloat16)(x)
    assert low.dtype == torch.float32
    assert F.cosine_similarity(low, exact, dim=-1).min() > 0.99


def test_weights_that_cannot_be_had_are_said(hub):
    with pytest.raises(ValueError, match=f'weights of the teacher {TEACHER} cannot be had .*404.* with --teacher-path'):
        create_teacher(TEACHER, (4, 4))
