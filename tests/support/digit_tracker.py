"""A minimal tracker on `JointEncoder`: it follows one of two digits over scikit-learn's photographs.

`python tests/support/digit_tracker.py strip.png` trains it for some minutes, prints its success rate beside that of a
tracker that never moves, and draws frames: the truth in green, the tracker in red.
"""
import sys
import time

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits, load_sample_images

from timm_itpn.tracking import JointEncoder, foreground_share

FRAME, SEARCH, TEMPLATE, GRID = 160, 128, 64, 8  # sides: of frames and crops in pixels, of the search map in tokens
SMALL = dict(embed_dim=64, depths=(1, 1, 6), num_heads=2, num_classes=0, img_size=SEARCH)


class Tracker(nn.Module):
    """Type embeddings, encoder, and a centre head: a score, and a box, for each token of the search image."""

    def __init__(self, **kwargs):
        super().__init__()
        model = timm.create_model('fast_itpn_tiny', **SMALL)
        self.encoder = JointEncoder(model, dict(search=SEARCH, template=TEMPLATE), **kwargs)
        self.foreground, self.background = nn.Parameter(torch.zeros(64)), nn.Parameter(torch.zeros(64))
        self.head = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.GELU(), nn.Conv2d(64, 5, 1))

    def template(self, crops):
        """Tokens of templates (B, 3, H, W), which have the target in the middle half; they may be kept."""
        share = foreground_share(torch.tensor([0.25, 0.25, 0.5, 0.5]), TEMPLATE, TEMPLATE)
        return self.encoder.embed(crops, 'template', torch.lerp(self.background, self.foreground, share[:, None]))

    def forward(self, search, template):
        """Scores (B, 64), and boxes (B, 64, 3): shift of the centre, right and down, in tokens; log of side / 32."""
        _, maps = self.encoder(dict(search=search, template=template))
        scores, boxes = self.head(maps['search']).flatten(2).split((1, 4), dim=1)
        return scores[:, 0], boxes.mT[..., :3]


class Scenes:
    """Frames of two digits over a photograph; boxes are squares (centre x, centre y, side), in pixels."""

    def __init__(self, seed, test):
        self.rng = torch.Generator().manual_seed(seed)
        self.photos = [torch.tensor(photo).permute(2, 0, 1) / 255 for photo in load_sample_images().images]
        digits = load_digits()
        held_out = torch.arange(len(digits.target)) % 5 == 0
        self.digits = torch.tensor(digits.images).float()[held_out == test] / 16
        self.labels = torch.tensor(digits.target)[held_out == test]

    def uniform(self, low, high, *shape):
        return low + (high - low) * torch.rand(shape, generator=self.rng)

    def scene(self):
        """A background, and the images and colours of two digits of different classes."""
        photo = self.photos[int(torch.randint(2, (), generator=self.rng))]
        top, left = (int(self.uniform(0, size - FRAME)) for size in photo.shape[1:])
        while True:
            pair = torch.randint(len(self.labels), (2,), generator=self.rng)
            if self.labels[pair[0]] != self.labels[pair[1]]:
                return photo[:, top:top + FRAME, left:left + FRAME], self.digits[pair], self.uniform(0.5, 1, 2, 3)

    def boxes(self):
        return torch.cat((self.uniform(30, FRAME - 30, 2, 2), self.uniform(20, 36, 2, 1)), dim=1)

    def draw(self, scene, boxes):
        frame, digits, colours = scene
        frame = frame.clone()
        for digit, colour, (x, y, side) in reversed(list(zip(digits, colours, boxes.tolist()))):  # the target in front
            left, top, side = round(x - side / 2), round(y - side / 2), round(side)
            ink = F.interpolate(digit[None, None], (side, side), mode='bilinear')[0, 0]
            x, y = max(left, 0), max(top, 0)
            ink = ink[y - top:FRAME - top, x - left:FRAME - left]
            area = frame[:, y:y + ink.shape[0], x:x + ink.shape[1]]
            area.copy_(torch.lerp(area, colour[:, None, None], ink))
        return frame

    def pair(self):
        """Template crop, search crop around a wrong guess, and the box in the search crop's pixels."""
        scene, boxes = self.scene(), self.boxes()
        template = crop(self.draw(scene, boxes), boxes[0], 2, TEMPLATE)
        boxes = torch.cat((self.boxes()[:, :2], boxes[:, 2:] * self.uniform(0.8, 1.25, 2, 1)), dim=1)
        if self.uniform(0, 1, 1) < 0.7:  # the other one is near
            boxes[1, :2] = boxes[0, :2] + self.uniform(-40, 40, 2)
        guess = boxes[0].clone()
        guess[:2] += self.uniform(-1, 1, 2) * guess[2]
        guess[2] *= self.uniform(0.85, 1.18, 1)[0]
        box = boxes[0].clone()
        box[:2] = (boxes[0, :2] - guess[:2]) * SEARCH / (4 * guess[2]) + SEARCH / 2
        box[2] *= SEARCH / (4 * guess[2])
        return template, crop(self.draw(scene, boxes), guess, 4, SEARCH), box

    def sequence(self, num=40):
        """Frames (num, 3, H, W), and boxes of the target (num, 3)."""
        scene, boxes = self.scene(), self.boxes()
        speed, frames, truth = self.uniform(-7, 7, 2, 2), [], []
        for _ in range(num):
            frames.append(self.draw(scene, boxes))
            truth.append(boxes[0].clone())
            speed += self.uniform(-1.5, 1.5, 2, 2)
            outside = (boxes[:, :2] + speed < 20) | (boxes[:, :2] + speed > FRAME - 20)
            speed = torch.where(outside, -speed, speed).clamp(-9, 9)
            boxes = torch.cat((boxes[:, :2] + speed, (boxes[:, 2:] * self.uniform(0.97, 1.03, 2, 1)).clamp(18, 40)), 1)
        return torch.stack(frames), torch.stack(truth)


def crop(frame, box, factor, size):
    """Square of `factor` times the side of the box around it, resized; normalised."""
    x, y, side = box.tolist()
    half = factor * side / FRAME
    theta = torch.tensor([[half, 0, 2 * x / FRAME - 1], [0, half, 2 * y / FRAME - 1]])
    grid = F.affine_grid(theta[None], (1, 3, size, size), align_corners=False)
    return (F.grid_sample(frame[None], grid, padding_mode='border', align_corners=False)[0] - 0.45) / 0.25


def loss_of(scores, boxes, truth):
    """Cross-entropy of the token that the centre is in, and the error of its box."""
    place = (truth[:, :2] / 16).floor().clamp(0, GRID - 1)
    index = (place[:, 1] * GRID + place[:, 0]).long()
    wanted = torch.cat((truth[:, :2] / 16 - place - 0.5, (truth[:, 2:] / 32).log()), dim=1)
    return F.cross_entropy(scores, index) + F.l1_loss(boxes[torch.arange(len(boxes)), index], wanted)


def train(tracker, updates, batch=32, rate=2e-3, seed=0):
    scenes = Scenes(seed, test=False)
    optimizer = torch.optim.AdamW(tracker.parameters(), rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=updates)
    tracker.train()
    for _ in range(updates):
        template, search, truth = (torch.stack(values) for values in zip(*(scenes.pair() for _ in range(batch))))
        loss = loss_of(*tracker(search, tracker.template(template)), truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return loss.item()


@torch.inference_mode()
def track(tracker, frames, first):
    """Boxes (num, 3) in all frames, from the one in the first."""
    kept, box, found = tracker.template(crop(frames[0], first, 2, TEMPLATE)[None]), first.clone(), [first]
    for frame in frames[1:]:
        scores, boxes = tracker(crop(frame, box, 4, SEARCH)[None], kept)
        index = int(scores[0].argmax())
        x, y, size = boxes[0, index].tolist()
        scale = 4 * box[2] / SEARCH
        centre = torch.tensor([(index % GRID + 0.5 + x) * 16, (index // GRID + 0.5 + y) * 16]) - SEARCH / 2
        side = (32 * torch.tensor(size).exp() * scale).clamp(12, 60)
        box = torch.cat(((box[:2] + centre * scale).clamp(0, FRAME), side[None]))
        found.append(box)
    return torch.stack(found)


def success(found, truth):
    """Share of the frames after the first whose boxes overlap by more than half (intersection over union)."""
    low = torch.maximum(found[:, :2] - found[:, 2:] / 2, truth[:, :2] - truth[:, 2:] / 2)
    high = torch.minimum(found[:, :2] + found[:, 2:] / 2, truth[:, :2] + truth[:, 2:] / 2)
    both = (high - low).clamp(min=0).prod(dim=1)
    return (both / (found[:, 2] ** 2 + truth[:, 2] ** 2 - both) > 0.5)[1:].float().mean().item()


def rates(tracker, num, seed=1):
    """Success rates in percent: of the tracker, and of one that never moves."""
    scenes = Scenes(seed, test=True)
    tracker.eval()
    results = []
    for _ in range(num):
        frames, truth = scenes.sequence()
        still = truth[:1].expand(truth.shape)
        results.append([success(boxes, truth) for boxes in (track(tracker, frames, truth[0]), still)])
    return (100 * torch.tensor(results).mean(dim=0)).tolist()


def strip(tracker, path, seed=2):
    """A PNG of every fifth frame of a sequence."""
    frames, truth = Scenes(seed, test=True).sequence()
    picture = Image.new('RGB', (8 * FRAME, FRAME))
    for i, (frame, *boxes) in enumerate(zip(frames[::5], truth[::5], track(tracker.eval(), frames, truth[0])[::5])):
        image = Image.fromarray((255 * frame.permute(1, 2, 0)).byte().numpy())
        for (x, y, side), colour in zip(boxes, ('lime', 'red')):
            corners = x - side / 2, y - side / 2, x + side / 2, y + side / 2
            ImageDraw.Draw(image).rectangle(corners, outline=colour)
        picture.paste(image, (i * FRAME, 0))
    picture.save(path)


if __name__ == '__main__':
    torch.manual_seed(0)
    start, tracker = time.perf_counter(), Tracker()
    loss = train(tracker, updates=int(sys.argv[2]) if sys.argv[2:] else 1200)
    ours, still = rates(tracker, num=50)
    seconds = time.perf_counter() - start
    print(f'loss {loss:.3f}; success rate {ours:.1f} %, without moving {still:.1f} %; {seconds:.0f} s')
    strip(tracker, sys.argv[1])
