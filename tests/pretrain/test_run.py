"""Whole runs, on a few small images."""
import functools

import pytest
import timm
import torch
from support.pretrain_runs import (
    MFM,
    MODEL_KWARGS,
    PIXEL,
    TEACHER,
    assert_same,
    log_lines,
    parse,
    run,
    teacher_file,
    weights,
    write_images,
)

from timm_itpn.pretrain import OBJECTIVE_NAMES, checkpoints
from timm_itpn.pretrain.run import Run

pytestmark = pytest.mark.usefixtures('one_thread')

COMMON = ('--model-ema', '--model-ema-decay', '0.5', '--drop-path', '0.3')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('data'))


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    return teacher_file(tmp_path_factory.mktemp('teacher'))


@pytest.fixture(scope='module')
def kwargs_of(teacher):
    """Model and arguments of an objective."""
    taught = ('--teacher', TEACHER, '--teacher-path', str(teacher))
    return {
        'clip': dict(objective=('--objective', 'clip', *taught)),
        'clip-distill': dict(objective=('--objective', 'clip-distill', *taught), model='itpn_tiny'),
        'pixel': dict(objective=PIXEL),
        'mfm': dict(objective=MFM),
    }


@pytest.fixture(scope='module')
def whole(data, kwargs_of, tmp_path_factory):
    """The folder of a run of an objective that nothing interrupted, made when it is first asked for."""
    @functools.cache
    def folder(name):
        output = tmp_path_factory.mktemp(name) / 'run'
        run(data, output, *COMMON, '--figure-interval', '2', **kwargs_of[name])
        return output
    return folder


def losses(folder):
    return [line['loss'] for line in log_lines(folder)]


class Killed(BaseException):
    """Nothing in a run may catch it."""


def kill_after(monkeypatch, num_updates):
    """Let the run die right after a step, as if the process were killed."""
    step = Run.step

    def dying(self, batch):
        losses = step(self, batch)
        if self.num_updates == num_updates:
            raise Killed
        return losses

    monkeypatch.setattr(Run, 'step', dying)


@pytest.mark.parametrize('name', OBJECTIVE_NAMES)
def test_interrupted_run_ends_with_the_same_weights(name, whole, data, kwargs_of, tmp_path, monkeypatch):
    """Killed in the middle of an epoch, right before its end, and between checkpoints."""
    more = (*COMMON, '--recovery-interval', '1', '--resume', 'auto')
    for num_updates in (1, 4, 7):
        with monkeypatch.context() as patch:
            kill_after(patch, num_updates)
            with pytest.raises(Killed):
                run(data, tmp_path / 'killed', *more, **kwargs_of[name])
    result = run(data, tmp_path / 'killed', *more, **kwargs_of[name])
    assert result['num_updates'] == 8
    assert_same(weights(tmp_path / 'killed'), weights(whole(name)))
    lines = log_lines(tmp_path / 'killed')
    assert [line['num_updates'] for line in lines] == list(range(1, 9))
    assert [line['loss'] for line in lines] == losses(whole(name))


def test_workers_do_not_change_the_result(whole, data, tmp_path):
    run(data, tmp_path / 'run', *COMMON, '--workers', '2')
    assert_same(weights(tmp_path / 'run'), weights(whole('pixel')))


def test_another_seed_changes_it(whole, data, tmp_path):
    run(data, tmp_path / 'run', *COMMON, '--seed', '1')
    assert losses(tmp_path / 'run')[0] != losses(whole('pixel'))[0]


@pytest.mark.parametrize(('name', 'more'), [
    ('clip', ('--grad-checkpointing',)),
    ('clip-distill', ('--grad-checkpointing',)),
    ('mfm', ('--grad-checkpointing',)),
    ('clip', ('--torchcompile', 'aot_eager')),
    ('clip', ('--amp',)),
    ('mfm', ('--amp', '--amp-dtype', 'float16')),
])
def test_options_compute_nearly_the_same(name, more, whole, data, kwargs_of, tmp_path, monkeypatch):
    expected = losses(whole(name))[:3]
    kill_after(monkeypatch, 4)
    with pytest.raises(Killed):
        run(data, tmp_path / 'run', *COMMON, *more, **kwargs_of[name])
    assert losses(tmp_path / 'run') == pytest.approx(expected, abs=0.02 if '--amp' in more else 1e-5)


def test_accumulated_gradients_are_those_of_a_large_batch(data, tmp_path):
    """The same images, but dealt to other batches: losses and weights are equal to float error."""
    base = ('--epochs', '2', '--warmup-epochs', '0', '--drop-path', '0', '--opt', 'sgd')
    run(data, tmp_path / 'large', *base, '--batch-size', '8')
    run(data, tmp_path / 'small', *base, '--batch-size', '4', '--grad-accum-steps', '2')
    large, small = weights(tmp_path / 'large'), weights(tmp_path / 'small')
    for key in large:
        torch.testing.assert_close(small[key], large[key], rtol=1e-4, atol=1e-6)
    assert losses(tmp_path / 'small') == pytest.approx(losses(tmp_path / 'large'), rel=1e-4)


@pytest.mark.parametrize('name', OBJECTIVE_NAMES)
def test_models_take_what_was_learned(name, whole, kwargs_of):
    """Nothing of backbone or pyramid is dropped on the way, from either file."""
    native = weights(whole(name))
    model_name = kwargs_of[name].get('model', 'fast_itpn_tiny')
    init_values = dict(init_values=0.1) if model_name == 'itpn_tiny' else {}
    for file in ('pretrained.safetensors', 'pretrained.pth'):
        model = timm.create_model(
            f'{model_name}_fpn', features_only=True, out_indices=[0, 1, 2, 3, 4], pretrained=True, img_size=64,
            pretrained_cfg_overlay=dict(file=str(whole(name) / file)), **MODEL_KWARGS, **init_values)
        state = {key.removeprefix('model.'): value for key, value in model.state_dict().items()}
        for key, value in native.items():
            if not key.startswith('pretrain.'):
                assert torch.equal(state[key], value), key


@pytest.mark.parametrize('name', OBJECTIVE_NAMES)
def test_files_of_a_run(name, whole):
    assert {path.name for path in whole(name).iterdir()} == {
        'args.json', 'log.jsonl', 'summary.csv', 'epoch-0002.png', 'epoch-0004.png', 'checkpoint-00000006.pt',
        'checkpoint-00000008.pt', 'pretrained.safetensors', 'pretrained.pth'}
    table = (whole(name) / 'summary.csv').read_text().splitlines()
    assert table[0].startswith('epoch,train_loss,') and table[0].endswith(',lr') and len(table) == 5


def test_runs_learn(data, tmp_path):
    run(data, tmp_path / 'run', '--epochs', '15', '--lr', '3e-3', '--hflip', '0', '--scale', '1', '1')
    assert losses(tmp_path / 'run')[-1] < 0.97 * losses(tmp_path / 'run')[0]


# what can go wrong

def test_started_run_is_not_overwritten(data, tmp_path):
    run(data, tmp_path / 'run', '--epochs', '1')
    with pytest.raises(ValueError, match='holds a run: go on with --resume auto, or name another folder'):
        run(data, tmp_path / 'run', '--epochs', '1')


def test_other_settings_are_refused_and_listed(data, tmp_path):
    run(data, tmp_path / 'run', '--epochs', '1')
    before = {path.name: path.read_bytes() for path in (tmp_path / 'run').iterdir()}
    with pytest.raises(ValueError, match=r'--epochs was 1, now 4; --lr was 0.001, now 0.1\. Use those'):
        run(data, tmp_path / 'run', '--lr', '0.1', '--resume', 'auto')
    assert before == {path.name: path.read_bytes() for path in (tmp_path / 'run').iterdir()}


def test_loss_that_is_not_finite_stops_the_run_and_keeps_the_batch(data, tmp_path):
    with pytest.raises(RuntimeError, match='The loss is nan in epoch .* Lower --lr'):
        run(data, tmp_path / 'run', '--lr', '1e30', '--clip-grad', '0', '--warmup-epochs', '0')
    batch = torch.load(tmp_path / 'run' / 'not_finite-0.pt', weights_only=True)
    assert batch['images'].shape == (4, 3, 64, 64) and batch['masked'].dtype == torch.bool


def test_full_disk_keeps_the_earlier_checkpoints(data, tmp_path, monkeypatch):
    run(data, tmp_path / 'run', '--epochs', '1')  # another run's settings: only the file matters
    earlier = tmp_path / 'run' / 'checkpoint-00000002.pt'
    saved = earlier.read_bytes()

    def full(state, path):
        path.write_bytes(b'a part')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(checkpoints.torch, 'save', full)
    folder = checkpoints.Checkpoints(tmp_path / 'run', keep=1)
    with pytest.raises(RuntimeError, match='No space left on device.*the last complete checkpoint is .*-00000002.pt'):
        folder.save({}, 4)
    assert folder.paths() == [earlier] and earlier.read_bytes() == saved


def test_file_that_is_not_a_checkpoint_is_refused(data, tmp_path):
    (tmp_path / 'some.pt').write_text('nothing')
    with pytest.raises(RuntimeError, match='some.pt is not a checkpoint of a run'):
        run(data, tmp_path / 'run', '--resume', str(tmp_path / 'some.pt'))
    with pytest.raises(RuntimeError, match='other.pt does not exist'):
        run(data, tmp_path / 'run', '--resume', str(tmp_path / 'other.pt'))


def test_unreadable_images_are_skipped_and_counted(tmp_path):
    data = write_images(tmp_path / 'data')
    (data / 'train' / 'class0' / '004.png').write_bytes(b'no image')
    result = run(data, tmp_path / 'run', '--batch-size', '5')
    assert result['skipped'] == 4  # once per epoch


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match='--data-dir .*nowhere does not exist'):
        run(tmp_path / 'nowhere', tmp_path / 'run')


def test_folder_without_images_is_refused(tmp_path):
    (tmp_path / 'data').mkdir()
    with pytest.raises(ValueError, match='--data-dir .* cannot be used'):
        run(tmp_path / 'data', tmp_path / 'run')


def test_too_few_images_are_refused(data, tmp_path):
    with pytest.raises(ValueError, match='10 images are fewer than one update takes: 64'):
        run(data, tmp_path / 'run', '--batch-size', '64')


@pytest.mark.parametrize(('more', 'message'), [
    (('--mask-ratio', '0'), '0 masked tokens of a 4 x 4 grid: there must be at least 1, and at most 15'),
    (('--mask-ratio', '1'), '16 masked tokens of a 4 x 4 grid'),
    (('--teacher', TEACHER), 'The objective pixel takes no teacher: leave out --teacher'),
    (('--objective-kwargs', 'width=3'), "The objective pixel cannot be created: .*'width'"),
    (('--model-kwargs', 'pyramid=False'), 'The student has no feature pyramid'),
    (('--model-kwargs', 'dynamic_img_size=True'), 'The student has dynamic_img_size=True'),
    (('--model-kwargs', 'acceleration=light'), 'there are no windows: create the student without acceleration'),
    (('--model-kwargs', 'pyramid_concat=True'), 'The student has pyramid_concat=True'),
    (('--device', 'cuda'), '--device is cuda, but there is no CUDA device'),
    (('--objective', 'clip', '--objective-kwargs'), 'The objective clip needs a teacher: --teacher vit_base'),
    (('--objective', 'pixel', '--model', 'itpn_tiny', '--model-kwargs', 'rel_pos_bias=True'),
     'create the student with rel_pos_bias=False'),
    (('--objective', 'clip-distill', '--model', 'itpn_tiny', '--objective-kwargs', '--model-kwargs',
      'rel_pos_bias=False', '--teacher', TEACHER), 'clip-distill needs relative position bias: rel_pos_bias=True'),
    (('--objective', 'clip-distill', '--objective-kwargs', '--teacher', TEACHER),
     'The objective clip-distill is for itpn models, not for fast_itpn: choose another'),
    (('--model', 'vit_base_patch16_224'), "there is no model 'vit_base_patch16_224'"),
])
def test_bad_arguments_are_told_in_a_sentence(more, message, data, teacher, tmp_path):
    if '--teacher' in more:
        more = (*more, '--teacher-path', str(teacher))
    with pytest.raises(ValueError, match=message):
        run(data, tmp_path / 'run', *more)
    assert not (tmp_path / 'run').exists()


def test_argument_without_value_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse(['--model-kwargs', 'depths'])
    assert "--model-kwargs: 'depths' is not an argument: write KEY=VALUE" in capsys.readouterr().err
