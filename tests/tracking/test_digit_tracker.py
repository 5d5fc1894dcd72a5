"""The example: its parts are right, and with minutes of training it follows."""
import pytest
import torch
from PIL import Image
from support import digit_tracker
from support.digit_tracker import Scenes, Tracker

pytestmark = pytest.mark.usefixtures('one_thread')


def test_example_trains_tracks_and_draws(tmp_path):
    torch.manual_seed(0)
    tracker = Tracker(migrate={2: 0.25})
    assert digit_tracker.train(tracker, updates=2, batch=4) < 20
    assert all(parameter.grad is not None for parameter in tracker.parameters())
    ours, still = digit_tracker.rates(tracker, num=1)
    assert 0 <= ours <= 100 and 0 <= still < 50
    digit_tracker.strip(tracker, tmp_path / 'strip.png')
    assert Image.open(tmp_path / 'strip.png').size == (8 * 160, 160)


def test_head_that_is_right_follows_the_target():
    scenes = Scenes(0, test=True)

    class Cheat(Tracker):
        """Knows where the target is."""

        def forward(self, search, template):
            frame = next(steps)
            box = torch.cat((truth[frame, :2] - guess[0][:2], truth[frame, 2:])) / (4 * guess[0][2]) * 128
            centre = box[:2] / 16 + 4
            index = int(centre[1]) * 8 + int(centre[0])
            boxes = torch.zeros(1, 64, 3)
            boxes[0, index] = torch.cat((centre - centre.floor() - 0.5, (box[2:] / 32).log()))
            guess[0] = truth[frame]
            return torch.eye(64)[index][None], boxes

    frames, truth = scenes.sequence()
    steps, guess = iter(range(1, 40)), [truth[0]]
    found = digit_tracker.track(Cheat().eval(), frames, truth[0])
    torch.testing.assert_close(found, truth, rtol=1e-3, atol=1e-2)
    assert digit_tracker.success(found, truth) == 1.
    shifted = truth + torch.tensor([10., 0., 0.])  # with 24 pixels: 14 / 34 of the union
    assert digit_tracker.success(shifted, truth) == (truth[1:, 2] > 30).float().mean()


@pytest.mark.slow
def test_trained_example_follows():
    torch.manual_seed(0)
    tracker = Tracker()
    digit_tracker.train(tracker, updates=1200)
    ours, still = digit_tracker.rates(tracker, num=50)
    assert ours > still + 40
