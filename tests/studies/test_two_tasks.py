"""The network of the experiments: its scores."""
import timm
import torch

from timm_itpn.studies import two_tasks
from timm_itpn.studies.canvases import Canvases, draw, load_digits


def test_scores_of_a_network_that_knows_everything():
    canvases = draw(*load_digits(test=True), num=10, side=64, copies=1, seed=0)

    class Oracle(torch.nn.Module):
        model = timm.create_model('fast_itpn_tiny', device='meta')

        def forward(self, images):
            return torch.eye(10)[canvases.labels], torch.eye(12)[canvases.token_labels]

    assert two_tasks.test(Oracle(), canvases) == {'top1': 100., 'miou': 100.}
    wrong = Canvases(canvases.images, (canvases.labels + 1) % 10, 1 - canvases.token_labels.clamp(max=1))
    scores = two_tasks.test(Oracle(), wrong)
    assert scores['top1'] == 0. and scores['miou'] < 5


def test_batches_go_through_all_canvases_before_they_repeat():
    canvases = Canvases(torch.zeros(5, 3, 1, 1), torch.arange(5), torch.zeros(5, 1, 1))
    labels = torch.cat([batch.labels for batch in two_tasks.batches(canvases, 5, 2, seed=0)])
    assert len(labels) == 10 and all(part.sort().values.tolist() == [0, 1, 2, 3, 4] for part in labels.split(5))
    again = torch.cat([batch.labels for batch in two_tasks.batches(canvases, 5, 2, seed=0)])
    assert torch.equal(labels, again)


def test_mean_is_of_the_rows_asked_for():
    rows = [dict(name='a', seed=seed, top1=value) for seed, value in enumerate((1., 2., 6.))]
    assert two_tasks.mean(rows, 'top1', name='a') == 3. and two_tasks.mean(rows, 'top1', name='b') is None
