"""Whole runs of detection, on a few small images."""
import json
import shutil

import pytest
import timm
import torch
from safetensors.torch import load_file
from support.detect_runs import BACKBONE, command, run, write_splits
from support.killed_runs import finish, start_ranks
from support.pretrain_runs import assert_same, log_lines

from timm_itpn.cli import main
from timm_itpn.detection.evaluate import NAMES
from timm_itpn.detection.model import mask_rcnn
from timm_itpn.engine.run import Run
from timm_itpn.tools.convert import convert

pytestmark = pytest.mark.usefixtures('one_thread')

DROPPING = ('--drop-path', '0.3')


class Killed(BaseException):
    """Nothing in a run may catch it."""


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_splits(tmp_path_factory.mktemp('data') / 'digits')


@pytest.fixture(scope='module')
def whole(data, tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    output = tmp_path_factory.mktemp('whole') / 'run'
    run(command(data, output, *DROPPING))
    return output


def weights(output):
    return load_file(output / 'detector.safetensors')


def losses(output):
    return [line['loss'] for line in log_lines(output)]


def test_interrupted_run_ends_with_the_same_weights(data, whole, tmp_path, monkeypatch):
    """Killed within an epoch, and right before the end; with a worker."""
    more = (*DROPPING, '--recovery-interval', '1', '--resume', 'auto', '--workers', '1')
    step = Run.step
    for last in (2, 4):
        def dying(self, batch, last=last):
            losses = step(self, batch)
            if self.num_updates == last:
                raise Killed
            return losses

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Run, 'step', dying)
            run(command(data, tmp_path / 'run', *more))
    run(command(data, tmp_path / 'run', *more))
    assert_same(weights(tmp_path / 'run'), weights(whole))
    assert losses(tmp_path / 'run') == losses(whole)
    assert (tmp_path / 'run' / 'summary.csv').read_text() == (whole / 'summary.csv').read_text()


def test_two_processes_compute_what_one_does(data, tmp_path):
    """With images of one size; what is sampled follows from the image."""
    more = ('--drop-path', '0', '--short-sides', '64', '--crop-short-sides', '64', '--crop-sides', '1000', '1000')
    ranks = start_ranks(command(data, tmp_path / 'two', *more, '--batch-size', '1'), run)
    run(command(data, tmp_path / 'one', *more))
    finish(*ranks)
    assert losses(tmp_path / 'two') == pytest.approx(losses(tmp_path / 'one'), rel=1e-4)
    ours, theirs = weights(tmp_path / 'two'), weights(tmp_path / 'one')
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-3, atol=1e-4)
    table, other = ((tmp_path / name / 'summary.csv').read_text().splitlines() for name in ('two', 'one'))
    assert table[0] == other[0] and len(table) == len(other) == 3


def test_files_of_a_run(data, whole):
    assert {path.name for path in whole.iterdir()} - {'.lock'} == {
        'args.json', 'log.jsonl', 'summary.csv', 'epoch-0001.png', 'epoch-0002.png', 'checkpoint-00000004.pt',
        'detector.safetensors', 'backbone.safetensors'}
    header = (whole / 'summary.csv').read_text().splitlines()[0].split(',')
    assert [name.removeprefix('eval_') for name in header if name.startswith('eval_')] == list(NAMES)
    settings = json.loads((whole / 'args.json').read_text())
    assert settings['max_side'] == round(1333 * 64 / 480) and settings['data'].startswith('4 images (')


def test_checkpoint_and_backbone_load_elsewhere(whole):
    state = torch.load(whole / 'checkpoint-00000004.pt', weights_only=True)['model']
    mask_rcnn('fast_itpn_tiny_fpn', 11, BACKBONE, 32, timm.layers.GroupNorm).load_state_dict(state)
    model = timm.create_model(
        'fast_itpn_tiny_fpn', features_only=True, pretrained=True, **BACKBONE,
        pretrained_cfg_overlay=dict(file=str(whole / 'backbone.safetensors')))
    for key, value in load_file(whole / 'backbone.safetensors').items():
        assert torch.equal(model.state_dict()[f'model.{key}'], value) and torch.equal(
            state[f'backbone.body.model.{key}'], value)


def test_backbone_says_what_it_was_created_with(whole, tmp_path):
    convert(whole / 'backbone.safetensors', tmp_path / 'out', verify=True)
    assert json.loads((tmp_path / 'out' / 'config.json').read_text())['model_args']['num_heads'] == 1


def test_checkpoint_is_measured_with_the_settings_of_its_run(data, whole, capsys):
    path = str(whole / 'checkpoint-00000004.pt')
    assert main(['detect', '--data-dir', str(data), '--evaluate', path, '--device', 'cpu', '-j', '0']) == 0
    measured = json.loads(capsys.readouterr().out)
    last = dict(zip(*(line.split(',') for line in (whole / 'summary.csv').read_text().splitlines()[::2])))
    assert measured == {name: float(last[f'eval_{name}']) if last[f'eval_{name}'] else None for name in NAMES}


@pytest.mark.parametrize('more', [
    ('--grad-checkpointing',), ('--amp',), ('--batch-size', '1', '--grad-accum-steps', '2')])
def test_options_compute_nearly_the_same(more, data, whole, tmp_path, monkeypatch):
    run(command(data, tmp_path / 'run', *DROPPING, '--eval-interval', '9', '--figure-interval', '0', *more))
    assert losses(tmp_path / 'run')[0] == pytest.approx(losses(whole)[0], rel=0.03)
    rows = (tmp_path / 'run' / 'summary.csv').read_text().splitlines()
    assert rows[1].count(',,') and not rows[2].count(',,,,')  # the last epoch is always measured


def test_broken_and_missing_images_are_skipped_and_told(data, tmp_path, capsys, caplog):
    shutil.copytree(data, tmp_path / 'data')
    (tmp_path / 'data' / 'train' / '0001.png').write_bytes(b'no image')
    (tmp_path / 'data' / 'val' / '0001.png').write_bytes(b'no image')
    (tmp_path / 'data' / 'train' / '0002.png').unlink()
    result = run(command(tmp_path / 'data', tmp_path / 'run', '--batch-size', '1', '--epochs', '1'))
    told = capsys.readouterr().err
    assert result['skipped'] == 1 and 'epoch 0: 1 images were skipped because they cannot be read, 0001.png (' in told
    assert '1 of 2 images are left out of the evaluation because they cannot be read, such as 0001.png (' in told
    assert 'Skipped 1 of 4 images, which are missing, such as' in caplog.text


@pytest.mark.parametrize('more, message', [
    (('--val-split', 'test'), r'there is no .*instances_test.json. Name another, or another split with --val-split'),
    (('--model', 'fast_itpn_tiny'), 'use a model whose name ends in _fpn'),
    (('--model-kwargs', 'foo=1'), 'The detector with fast_itpn_tiny_fpn cannot be created: TypeError'),
    (('--model-kwargs', 'drop_path_rate=0'), 'The detector with fast_itpn_tiny_fpn cannot be created: TypeError'),
    (('--detector-kwargs', 'foo=1'), "The detector has no argument 'foo'"),
    (('--model-kwargs', 'in_chans=1'), 'cannot be created: RuntimeError .* to have 1 channels, but got 3'),
    (('--model-kwargs', 'embed_dim=0'), 'cannot be created: '),
    (('--detector-kwargs', 'rpn_batch_size_per_image=0'), 'cannot be created: ArithmeticError its loss is nan'),
    (('--detector-kwargs', 'box_score_thresh=x'), 'cannot be created: TypeError'),
    (('--crop-sides', '9', '8'), 'the smaller one comes first'),
    (('--warmup-epochs', '2'), '--epochs 2 end within the warm-up'),
    (('--batch-size', '5'), '4 images are fewer than one update takes: 5'),
])
def test_bad_arguments_are_told_in_a_sentence(more, message, data, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(command(data, tmp_path / 'run', *more))
    assert not (tmp_path / 'run').exists()
