"""Which tokens leave, and that all come back."""
import pytest
import torch

from timm_itpn.acceleration.migration import Left, replenish, select, similarity, take


def random_tokens(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_similarity_is_the_largest_cosine_to_the_other_half():
    x = random_tokens(2, 3, 7, 8)
    actual, partners = similarity(x)
    for b, w, i in ((0, 0, 0), (1, 2, 2), (0, 1, 1)):
        cosines = [torch.cosine_similarity(x[b, w, 2 * i + 1], x[b, w, j], dim=0) for j in range(0, 7, 2)]
        torch.testing.assert_close(actual[b, w, i], max(cosines))
        assert partners[b, w, i] == 2 * cosines.index(max(cosines))


def test_padded_positions_are_never_similar():
    x = random_tokens(1, 2, 6, 8)
    real = torch.tensor([[[True] * 6, [True] * 4 + [False] * 2]])
    actual = similarity(x, real)
    for value, first, second in zip(actual, similarity(x[:, :1]), similarity(x[:, 1:, :4])):
        torch.testing.assert_close(value[:, :1], first)
        torch.testing.assert_close(value[:, 1:, :2], second)
    assert (actual[0][:, 1, 2] == -torch.inf).all() and (actual[1][:, 1] < 4).all()


def test_the_most_similar_of_one_half_leave():
    nearest = torch.tensor([[[0.1, 0.9, 0.5, 0.7]], [[0.9, 0.1, 0.2, 0.3]]])
    partners = torch.tensor([[[2, 8, 4, 0]], [[6, 4, 2, 6]]])
    stay, leave, partners = select(nearest, partners, num_tokens=9, num_leave=2)
    assert leave.tolist() == [[[3, 7]], [[1, 7]]] and partners.tolist() == [[[8, 0]], [[6, 6]]]
    assert stay.tolist() == [[[0, 1, 2, 4, 5, 6, 8]], [[0, 2, 3, 4, 5, 6, 8]]]


def test_of_equal_tokens_the_first_leave():
    _, leave, partners = select(*similarity(torch.ones(1, 1, 100, 4)), num_tokens=100, num_leave=20)
    assert leave.flatten().tolist() == list(range(1, 41, 2)) and not partners.any()


def test_nobody_leaves_if_none_is_to():
    stay, leave, partners = select(torch.rand(2, 3, 4), torch.zeros(2, 3, 4, dtype=torch.int64), 8, num_leave=0)
    assert leave.shape == partners.shape == (2, 3, 0)
    assert torch.equal(stay, torch.arange(8).expand(2, 3, 8))


def test_take_is_by_window():
    x = random_tokens(2, 3, 5, 4)
    indices = torch.randint(5, (2, 3, 2), generator=torch.Generator().manual_seed(0))
    assert torch.equal(take(x, indices), torch.take_along_dim(x, indices[..., None], dim=2))


@pytest.mark.parametrize('carry', [False, True])
def test_everything_returns_to_its_position(carry):
    """Of 12 positions in 3 windows, and a padded one in each, a quarter leaves, then another."""
    order = torch.stack([torch.randperm(12, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    first, second, stayed = order.reshape(2, 3, 4).split((1, 1, 2), dim=2)
    x, gone, gone_later, then, then_later = (random_tokens(2, 3, n, 4) + n for n in (3, 1, 1, 1, 1))
    positions = torch.cat((stayed, torch.full((2, 3, 1), 12)), dim=2)
    left = [Left(gone, first, then, second), None, Left(gone_later, second, then_later, stayed[:, :, :1]), None]
    back = replenish(x, positions, left, 12, carry)
    if carry:
        gone_later = gone_later + (x[:, :, :1] - then_later)
        gone = gone + (gone_later - then)  # its partner, which left later, is up to date
    for tokens, where in ((gone, first), (gone_later, second), (x[:, :, :2], stayed)):
        assert torch.equal(torch.take_along_dim(back, where.reshape(2, -1, 1), dim=1), tokens.flatten(1, 2))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
def test_types_are_kept_and_nothing_changes_where_nothing_happened(dtype):
    x = random_tokens(1, 1, 8, 4).to(dtype)
    nearest, partners = similarity(x)
    stay, leave, partners = select(nearest, partners, 8, 4)
    back = replenish(take(x, stay), stay, [Left(take(x, leave), leave, take(x, partners), partners)], 8, carry=True)
    assert nearest.dtype == dtype and torch.equal(back, x[0])
    assert torch.equal(replenish(x, torch.arange(8)[None, None], [None], 8, carry=True), x[0])
