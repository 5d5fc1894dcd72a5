"""Whole runs, on a few small images."""
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
    run,
    teacher_file,
    weights,
    write_images,
)

from timm_itpn.pretrain import checkpoints
from timm_itpn.pretrain.run import Run

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('data'))


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    return teacher_file(tmp_path_factory.mktemp('teacher'))


def objective_of(name, teacher):
    if name in ('pixel', 'mfm'):
        return dict(objective=PIXEL if name == 'pixel' else MFM)
    model = 'fast_itpn_tiny' if name == 'clip' else 'itpn_tiny'
    return dict(
        objective=('--objective', name, '--teacher', TEACHER, '--teacher-path', str(teacher)), model=model)


class Killed(BaseException):
    """Nothing in a run may catch it."""


def kill_after(monkeypatch, num_updates):
    """Let the run die right after an update, as if the process were killed."""
    update = Run.update

    def dying(self):
        update(self)
        if self.num_updates == num_updates:
            raise Killed

    monkeypatch.setattr(Run, 'update', dying)


@pytest.mark.parametrize('name', ['clip', 'clip-distill', 'pixel', 'mfm'])
def test_interrupted_run_ends_with_the_same_weights(name, data, teacher, tmp_path, monkeypatch):
    """Killed in the midst of an epoch, right before its end, and between checkpoints."""
    kwargs = objective_of(name, teacher)
    more = ('--recovery-interval', '1', '--model-ema', '--model-ema-decay', '0.5', '--drop-path', '0.3')
    run(data, tmp_path / 'whole', *more, **kwargs)
    for num_updates in (1, 4, 7):
        with monkeypatch.context() as patch:
            kill_after(patch, num_updates)
            with pytest.raises(Killed):
                run(data, tmp_path / 'killed', *more, '--resume', 'auto', **kwargs)
    result = run(data, tmp_path / 'killed', *more, '--resume', 'auto', **kwargs)
    assert result['num_updates'] == 8
    assert_same(weights(tmp_path / 'killed'), weights(tmp_path / 'whole'))
    lines = [log_lines(tmp_path / folder) for folder in ('whole', 'killed')]
    losses = [[(line['num_updates'], line['loss']) for line in part] for part in lines]
    assert losses[0] == losses[1] and [num for num, _ in losses[0]] == list(range(1, 9))


def test_workers_do_not_change_the_result(data, tmp_path):
    run(data, tmp_path / 'none')
    run(data, tmp_path / 'two', '--workers', '2')
    assert_same(weights(tmp_path / 'two'), weights(tmp_path / 'none'))


def test_another_seed_changes_it(data, tmp_path):
    run(data, tmp_path / 'one', '--epochs', '1')
    run(data, tmp_path / 'other', '--epochs', '1', '--seed', '1')
    with pytest.raises(AssertionError):
        assert_same(weights(tmp_path / 'other'), weights(tmp_path / 'one'))


@pytest.mark.parametrize('more', [
    ('--grad-checkpointing',), ('--torchcompile', 'aot_eager'), ('--amp',), ('--amp', '--amp-dtype', 'float16')])
@pytest.mark.parametrize('name', ['clip', 'mfm'])
def test_options_compute_nearly_the_same(name, more, data, teacher, tmp_path):
    kwargs = objective_of(name, teacher)
    lines = []
    for folder, extra in (('plain', ()), ('option', more)):
        run(data, tmp_path / folder, '--drop-path', '0.3', '--epochs', '2', *extra, **kwargs)
        lines.append(log_lines(tmp_path / folder))
    for plain, option in zip(*lines):
        assert option['loss'] == pytest.approx(plain['loss'], abs=0.02 if '--amp' in more else 1e-5)


def test_accumulated_gradients_are_those_of_a_large_batch(data, tmp_path):
    """The same images, but dealt to other batches: losses and weights are equal to float error."""
    base = ('--epochs', '2', '--warmup-epochs', '0', '--drop-path', '0', '--opt', 'sgd')
    run(data, tmp_path / 'large', *base, '--batch-size', '8')
    run(data, tmp_path / 'small', *base, '--batch-size', '4', '--grad-accum-steps', '2')
    large, small = weights(tmp_path / 'large'), weights(tmp_path / 'small')
    for key in large:
        torch.testing.assert_close(small[key], large[key], rtol=1e-4, atol=1e-6)
    losses = [[line['loss'] for line in log_lines(tmp_path / name)] for name in ('small', 'large')]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize('name', ['clip', 'clip-distill', 'pixel', 'mfm'])
def test_models_take_what_was_learned(name, data, teacher, tmp_path):
    """Nothing of backbone or pyramid is dropped on the way, from either file."""
    kwargs = objective_of(name, teacher)
    result = run(data, tmp_path / 'run', '--epochs', '1', **kwargs)
    native = weights(tmp_path / 'run')
    model_name = kwargs.get('model', 'fast_itpn_tiny')
    family = {'pixel': dict(), 'mfm': dict()}.get(name, {})
    if model_name == 'itpn_tiny':
        family = dict(init_values=0.1)
    for file in (result['native'], result['official']):
        model = timm.create_model(
            f'{model_name}_fpn', features_only=True, out_indices=[0, 1, 2, 3, 4], pretrained=True, img_size=64,
            pretrained_cfg_overlay=dict(file=file), **MODEL_KWARGS, **family)
        state = {key.removeprefix('model.'): value for key, value in model.state_dict().items()}
        for key, value in native.items():
            if not key.startswith('pretrain.'):
                assert torch.equal(state[key], value), key


def test_files_of_a_run(data, tmp_path):
    result = run(data, tmp_path / 'run', '--figure-interval', '2', '--checkpoint-hist', '2')
    names = {path.name for path in (tmp_path / 'run').iterdir()}
    assert names == {
        'args.json', 'log.jsonl', 'summary.csv', 'epoch-0002.png', 'epoch-0004.png', 'checkpoint-00000006.pt',
        'checkpoint-00000008.pt', 'pretrained.safetensors', 'pretrained.pth'}
    assert result['skipped'] == 0
    table = (tmp_path / 'run' / 'summary.csv').read_text().splitlines()
    assert table[0] == 'epoch,train_loss,lr' and len(table) == 5


def test_runs_learn(data, tmp_path):
    run(data, tmp_path / 'run', '--epochs', '40', '--hflip', '0', '--scale', '1', '1')
    lines = log_lines(tmp_path / 'run')
    assert lines[-1]['loss'] < 0.97 * lines[0]['loss']


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


def test_loss_that_is_no_number_stops_the_run_and_keeps_the_batch(data, tmp_path):
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
    with pytest.raises(RuntimeError, match='No space left on device.*the last one that was is checkpoint-00000002.pt'):
        folder.save({}, 4)
    assert folder.paths() == [earlier] and earlier.read_bytes() == saved


def test_file_that_is_no_checkpoint_is_refused(data, tmp_path):
    (tmp_path / 'some.pt').write_text('nothing')
    with pytest.raises(RuntimeError, match='some.pt is no checkpoint of a run'):
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


def test_classes_without_images_are_named(tmp_path):
    data = write_images(tmp_path / 'data')
    (data / 'train' / 'class7').mkdir()
    with pytest.raises(ValueError, match='classes without images: class7'):
        run(data, tmp_path / 'run')


def test_folder_without_images_is_refused(tmp_path):
    (tmp_path / 'data').mkdir()
    with pytest.raises(ValueError, match='--data-dir .* cannot be used'):
        run(tmp_path / 'data', tmp_path / 'run')


def test_too_few_images_are_refused(data, tmp_path):
    with pytest.raises(ValueError, match='10 images are fewer than one update takes: 64'):
        run(data, tmp_path / 'run', '--batch-size', '64')


@pytest.mark.parametrize(('more', 'message'), [
    (('--mask-ratio', '1'), '16 masked tokens of a 4 x 4 grid'),
    (('--teacher', TEACHER), 'The objective pixel has no teacher'),
    (('--objective-kwargs', 'width=3'), "The objective pixel cannot be made: .*'width'"),
    (('--model-kwargs', 'pyramid=False'), 'The student has no feature pyramid'),
    (('--model-kwargs', 'dynamic_img_size=True'), 'The student has dynamic_img_size=True'),
    (('--model-kwargs', 'acceleration=light'), 'there are no windows: create the student without acceleration'),
    (('--model-kwargs', 'depths'), "'depths' is no argument: write KEY=VALUE"),
    (('--device', 'cuda'), '--device is cuda, but there is no CUDA device'),
    (('--objective', 'clip', '--objective-kwargs'), 'The objective clip needs a teacher: name one with --teacher'),
    (('--objective', 'clip-distill', '--objective-kwargs', '--teacher', TEACHER),
     'The objective clip-distill is for ITPN, not for FastITPN'),
    (('--model', 'vit_base_patch16_224'), "there is no model 'vit_base_patch16_224'"),
])
def test_bad_arguments_are_told_in_a_sentence(more, message, data, teacher, tmp_path):
    if '--teacher' in more:
        more = (*more, '--teacher-path', str(teacher))
    with pytest.raises(ValueError, match=message):
        run(data, tmp_path / 'run', *more)
    assert not (tmp_path / 'run').exists()
