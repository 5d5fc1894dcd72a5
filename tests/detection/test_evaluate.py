"""Average precision, against values by hand, and without anything to find."""
import json

import pytest
import torch
from support.coco import write_coco

from timm_itpn.detection.data import CocoDataset, eval_transforms
from timm_itpn.detection.evaluate import average_precision, evaluate, predict


class Oracle(torch.nn.Module):
    """Predicts what is there, moved to the right."""

    def __init__(self, dataset, shift=0, share=1.):
        super().__init__()
        self.dataset, self.shift, self.share = dataset, shift, share
        self.asked = 0

    def forward(self, images):
        outputs = []
        for _ in images:
            _, target = self.dataset[self.asked]
            self.asked += 1
            number = int(len(target['boxes']) * self.share)
            outputs.append(dict(
                boxes=target['boxes'][:number] + torch.tensor([self.shift, 0, self.shift, 0]),
                labels=target['labels'][:number],
                scores=torch.linspace(1, 0.5, number),
                masks=target['masks'][:number, None].float().roll(self.shift, dims=-1)))
        return outputs


@pytest.fixture
def dataset(tmp_path):
    return CocoDataset(write_coco(tmp_path, 3), tmp_path, eval_transforms())


CPU = torch.device('cpu')


def results_of(model, dataset):
    """Of all images, in batches of two and one."""
    batches = [dataset.collate([dataset[0], dataset[1]]), dataset.collate([dataset[2]])]
    return [result for batch in batches for result in predict(model, batch, dataset.category_ids, CPU)]


def test_perfect_predictions_have_an_average_precision_of_one(dataset):
    model = Oracle(dataset).train()
    found = evaluate(model, dataset, CPU)
    assert list(found) == [f'{kind}_{metric}' for kind in ('box', 'mask')
                           for metric in ('AP', 'AP50', 'AP75', 'APs', 'APm', 'APl')]
    assert found['box_AP'] == found['mask_AP'] == found['box_APs'] == pytest.approx(1)
    assert found['box_APl'] is None  # there is no large digit
    assert model.training


def test_shifted_boxes_count_up_to_their_overlap(dataset):
    for row in dataset.coco.dataset['annotations']:
        row['bbox'] = [10, 10, 40, 40]
    found = average_precision(dataset, results_of(Oracle(dataset, shift=4), dataset))
    assert found['box_AP'] == pytest.approx(0.7)  # 36 / 44 = 0.82 is above 7 of the 10 thresholds
    assert (found['box_AP50'], found['box_AP75']) == (1, 1)
    assert 0 <= found['mask_AP'] < found['box_AP']


def test_results_are_in_the_format_of_coco(dataset):
    results = results_of(Oracle(dataset), dataset)
    assert json.loads(json.dumps(results)) == results
    rows = dataset.coco.dataset['annotations']
    for result, row in zip(results, rows):
        assert (result['image_id'], result['category_id'], result['bbox'], result['segmentation']) == (
            row['image_id'], row['category_id'], row['bbox'], row['segmentation'])


def test_nothing_predicted_is_zero(dataset, capsys):
    found = evaluate(Oracle(dataset, share=0.), dataset, CPU)
    assert found['box_AP'] == found['mask_AP'] == 0
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize('share', [0., 1.])
def test_nothing_to_find_is_none(tmp_path, dataset, share):
    path = tmp_path / 'instances.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), 'annotations': []}))
    empty = CocoDataset(path, tmp_path, eval_transforms())
    found = evaluate(Oracle(dataset, share=share), empty, CPU)
    assert set(found.values()) == {None}


def test_images_that_are_missing_or_broken_are_not_counted(tmp_path, capsys):
    path = write_coco(tmp_path, 4)
    (tmp_path / '0002.png').unlink()
    dataset = CocoDataset(path, tmp_path, eval_transforms())
    (tmp_path / '0004.png').write_bytes(b'no image')
    assert evaluate(Oracle(dataset), dataset, CPU)['box_AP'] == pytest.approx(1)
    (tmp_path / '0001.png').unlink()
    (tmp_path / '0003.png').write_bytes(b'')
    with pytest.raises(RuntimeError, match='No image for the evaluation can be read, such as 0001.png .*: mend them'):
        evaluate(Oracle(dataset), dataset, CPU)
    assert '1 of 3 images are left out of the evaluation because they cannot be read, such as 0004.png (' in (
        capsys.readouterr().err)
