"""The network of the experiments: its batches and its scores."""
import timm
import torch

from timm_itpn.studies import two_tasks
from timm_itpn.studies.canvases import Canvases, draw, load_digits
from timm_itpn.studies.two_tasks import Training


def test_scores_of_a_network_that_knows_everything():
    canvases = draw(*load_digits(test=True), num=10, side=64, copies=1, seed=0)

    class Oracle(torch.nn.Module):
        model = timm.create_model('fast_itpn_tiny', img_size=64, embed_dim=64, depths=(1, 1, 1), num_heads=2)

        def forward(self, images):
            return torch.eye(10)[canvases.labels], torch.eye(12)[canvases.token_labels]

    assert two_tasks.test(Oracle(), canvases) == {'top-1': 100., 'mIoU': 100.}
    wrong = Canvases(canvases.images, (canvases.labels + 1) % 10, 1 - canvases.token_labels.clamp(max=1))
    scores = two_tasks.test(Oracle(), wrong)
    assert scores['top-1'] == 0. and scores['mIoU'] < 5


def test_training_sees_all_canvases_before_one_repeats():
    canvases = Canvases(torch.zeros(5, 3, 1, 1), torch.arange(5), torch.zeros(5, 1, 1))
    layer, orders, progress = torch.nn.Linear(1, 1), [], []
    for _ in range(2):
        seen = []

        def loss_of(batch, seen=seen):
            seen.extend(batch.labels.tolist())
            return layer(torch.ones(1, 1)).sum()

        two_tasks.fit(layer, loss_of, canvases, Training(5, 2, 1e-3), seed=0, after_update=progress.append)
        orders.append(seen)
    assert sorted(orders[0][:5]) == sorted(orders[0][5:]) == [0, 1, 2, 3, 4] and orders[0] == orders[1]
    assert progress == [0.2, 0.4, 0.6, 0.8, 1.] * 2
