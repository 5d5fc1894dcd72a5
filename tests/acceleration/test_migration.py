"""Which tokens leave, and that all come back."""
import pytest
import torch

from timm_itpn.acceleration.migration import replenish, select, similarity, take


def random_tokens(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_similarity_is_the_largest_cosine_to_the_other_half():
    x = random_tokens(2, 3, 7, 8)
    actual = similarity(x)
    for b, w, i in ((0, 0, 0), (1, 2, 2), (0, 1, 1)):
        cosines = [torch.cosine_similarity(x[b, w, 2 * i + 1], x[b, w, j], dim=0) for j in range(0, 7, 2)]
        torch.testing.assert_close(actual[b, w, i], max(cosines))


def test_padded_positions_are_never_similar():
    x = random_tokens(1, 2, 6, 8)
    real = torch.tensor([[[True] * 6, [True] * 4 + [False] * 2]])
    actual = similarity(x, real)
    torch.testing.assert_close(actual[:, :1], similarity(x[:, :1]))
    torch.testing.assert_close(actual[:, 1:, :2], similarity(x[:, 1:, :4]))
    assert (actual[:, 1, 2] == -torch.inf).all()


def test_the_most_similar_of_one_half_leave():
    nearest = torch.tensor([[[0.1, 0.9, 0.5, 0.7]], [[0.9, 0.1, 0.2, 0.3]]])
    stay, leave = select(nearest, num_tokens=9, num_leave=2)
    assert leave.tolist() == [[[3, 7]], [[1, 7]]]
    assert stay.tolist() == [[[0, 1, 2, 4, 5, 6, 8]], [[0, 2, 3, 4, 5, 6, 8]]]


def test_of_equal_tokens_the_first_leave():
    _, leave = select(torch.zeros(1, 1, 50), num_tokens=100, num_leave=20)
    assert leave.flatten().tolist() == list(range(1, 41, 2))


def test_nobody_leaves_if_none_is_to():
    stay, leave = select(torch.rand(2, 3, 4), num_tokens=8, num_leave=0)
    assert leave.shape == (2, 3, 0)
    assert torch.equal(stay, torch.arange(8).expand(2, 3, 8))


def test_take_is_by_window():
    x = random_tokens(2, 3, 5, 4)
    indices = torch.randint(5, (2, 3, 2), generator=torch.Generator().manual_seed(0))
    assert torch.equal(take(x, indices), torch.take_along_dim(x, indices[..., None], dim=2))


def test_everything_returns_to_its_position():
    x = random_tokens(2, 12, 4)
    order = torch.stack([torch.randperm(12, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    tokens = torch.take_along_dim(x, order[..., None], dim=1).reshape(2, 3, 4, 4)
    positions = order.reshape(2, 3, 4)
    padding = torch.full((2, 3, 1), 12)
    groups = [tokens[:, :, :1], tokens[:, :, 1:], torch.full((2, 3, 1, 4), torch.nan)]
    back = replenish(groups, [positions[:, :, :1], positions[:, :, 1:], padding], num_tokens=12)
    assert torch.equal(back, x)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
def test_types_are_kept(dtype):
    x = random_tokens(1, 1, 8, 4).to(dtype)
    assert similarity(x).dtype == dtype
    positions = torch.arange(8).reshape(1, 1, 8)
    assert replenish([x], [positions], 8).dtype == dtype
