"""Whole runs, on a few small images."""
import contextlib
import functools
import json
import os
import resource
import shutil
import zipfile

import filelock
import pytest
import timm
import torch
from PIL import Image
from support.pretrain_runs import (
    MFM,
    MODEL_KWARGS,
    PIXEL,
    TEACHER,
    assert_same,
    command,
    log_lines,
    parse,
    run,
    teacher_file,
    weights,
    write_images,
)

from timm_itpn.engine import checkpoints
from timm_itpn.engine.checkpoints import Checkpoints, load
from timm_itpn.engine.run import Run
from timm_itpn.pretrain import OBJECTIVE_NAMES
from timm_itpn.pretrain.task import pretrain
from timm_itpn.tools.convert import convert

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


@pytest.mark.parametrize('name', ['clip', 'mfm'])
def test_interrupted_run_ends_with_the_same_weights(name, whole, data, kwargs_of, tmp_path, monkeypatch):
    """Killed in the middle of an epoch and, for one objective, right before its end, and between checkpoints."""
    more = (*COMMON, '--recovery-interval', '1', '--resume', 'auto')
    for num_updates in (1, 4, 7) if name == 'mfm' else (5,):
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
    assert (tmp_path / 'killed' / 'summary.csv').read_text() == (whole(name) / 'summary.csv').read_text()


def test_workers_do_not_change_the_result(whole, data, tmp_path):
    run(data, tmp_path / 'run', *COMMON, '--workers', '2')
    assert_same(weights(tmp_path / 'run'), weights(whole('pixel')))


def test_another_seed_changes_it(whole, data, tmp_path):
    run(data, tmp_path / 'run', *COMMON, '--seed', '1')
    assert losses(tmp_path / 'run')[0] != losses(whole('pixel'))[0]


@pytest.mark.parametrize(('name', 'more'), [
    ('clip', ('--grad-checkpointing',)),
    ('mfm', ('--grad-checkpointing',)),
    ('clip', ('--torchcompile', 'eager')),
    ('pixel', ('--amp',)),
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


@pytest.mark.parametrize(('file', 'model'), [('pretrained.safetensors', None), ('pretrained.pth', 'fast_itpn_tiny')])
def test_files_say_what_the_model_was_created_with(file, model, whole, tmp_path):
    convert(whole('pixel') / file, tmp_path / 'out', model, verify=True)
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert config['architecture'] == 'fast_itpn_tiny' and config['pretrained_cfg']['input_size'] == [3, 64, 64]
    assert config['model_args'].items() >= {**MODEL_KWARGS, 'depths': [1, 1, 2]}.items()


@pytest.mark.parametrize('name', OBJECTIVE_NAMES)
def test_files_of_a_run(name, whole):
    assert {path.name for path in whole(name).iterdir()} - {'.lock'} == {
        'args.json', 'log.jsonl', 'summary.csv', 'epoch-0002.png', 'epoch-0004.png', 'checkpoint-00000008.pt',
        'pretrained.safetensors', 'pretrained.pth'}
    assert len({path.stat().st_mode for path in whole(name).iterdir() if path.name[0] != '.'}) == 1
    table = (whole(name) / 'summary.csv').read_text().splitlines()
    assert table[0].startswith('epoch,train_loss,') and table[0].endswith(',lr') and len(table) == 5


def test_runs_learn(data, tmp_path):
    run(data, tmp_path / 'run', '--epochs', '15', '--lr', '3e-3', '--hflip', '0', '--scale', '1', '1')
    assert losses(tmp_path / 'run')[-1] < 0.97 * losses(tmp_path / 'run')[0]


# what can go wrong

def test_started_run_is_not_overwritten(data, tmp_path):
    run(data, tmp_path / 'run', '--epochs', '1', '--warmup-epochs', '0')
    with pytest.raises(ValueError, match='holds a run: go on with --resume auto, or name another folder'):
        run(data, tmp_path / 'run', '--epochs', '1', '--warmup-epochs', '0')


@pytest.fixture(scope='module')
def begun(data, tmp_path_factory):
    """The folder of a run that was killed after 5 of 8 updates, with a checkpoint of each; tests copy it."""
    output = tmp_path_factory.mktemp('begun') / 'run'
    with pytest.MonkeyPatch.context() as patch:
        kill_after(patch, 6)
        with pytest.raises(Killed):
            run(data, output, '--recovery-interval', '1', '--checkpoint-hist', '9')
    return output


@pytest.fixture(scope='module')
def left_alone(data, tmp_path_factory):
    """The folder of the same run, which nothing interrupted."""
    output = tmp_path_factory.mktemp('left_alone') / 'run'
    run(data, output)
    return output


@pytest.fixture
def copied(begun, tmp_path):
    shutil.copytree(begun, tmp_path / 'run')
    return tmp_path / 'run'


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != '.lock'}


@pytest.mark.parametrize(('more', 'message'), [
    (('--epochs', '5', '--batch-size', '2'), r'other settings: --batch-size was 4, now 2; --epochs was 4, now 5\. Use'),
    (('--weight-decay', '0.1'), '--weight-decay was 0.05, now 0.1'),
    (('--lr', '1e-4', '--seed', '1'), 'other settings: --seed was 42, now 1. Use'),
])
def test_other_settings_are_refused_and_listed(more, message, data, copied):
    before = contents(copied)
    with pytest.raises(ValueError, match=message):
        run(data, copied, *more, '--resume', 'auto')
    assert before == contents(copied)


def test_settings_are_the_same_however_they_are_written(data, copied, tmp_path):
    """A tuple of the command line, a list of a YAML file; and processes are no option."""
    (tmp_path / 'x.yaml').write_text(json.dumps({'model_kwargs': MODEL_KWARGS}))
    argv = command(data, copied, '--resume', 'auto', '-c', str(tmp_path / 'x.yaml'))
    at = argv.index('--model-kwargs')
    del argv[at:at + 1 + len(MODEL_KWARGS)]
    args = parse(argv)
    assert args.model_kwargs == {**MODEL_KWARGS, 'depths': [1, 1, 2]}
    assert pretrain(args)['num_updates'] == 8
    path = Checkpoints(copied, 1).paths()[-1]
    state = load(path)
    state['settings']['world_size'] = 2
    torch.save(state, path)
    with pytest.raises(ValueError, match='other settings: the number of processes was 2, now 1. Use'):
        pretrain(parse(argv))


def test_what_may_change_does_and_is_told(data, copied, capsys):
    more = ('--lr', '1e-4', '--amp', '--amp-dtype', 'float16', '--workers', '1', '--clip-grad', '1')
    assert run(data, copied, *more, '--resume', 'auto')['num_updates'] == 8
    told = capsys.readouterr().err
    assert all(text in told for text in ('--amp was False, now True', '--lr was 0.001, now 0.0001'))
    assert log_lines(copied)[-1]['lr'] < 1e-4


def test_other_images_are_refused_unless_asked_for(data, copied, tmp_path):
    """The epoch begins again with them, at the learning rate of that epoch."""
    more = ('--resume', 'auto', '--recovery-interval', '1', '--figure-interval', '1')
    shutil.copytree(data, tmp_path / 'data')
    other = write_images(tmp_path / 'data', num=14)
    with pytest.raises(ValueError, match=r'other data: was .10 images \(.*now .14 images \(.*by --changed-data'):
        run(other, copied, *more)
    kept = [line for line in log_lines(copied) if line['num_updates'] <= 5]
    assert run(other, copied, *more, '--changed-data')['num_updates'] == 5 + 2 * 3
    lines = log_lines(copied)
    assert lines[:5] == kept and [line['epoch'] for line in lines[5:]] == [2, 2, 2, 3, 3, 3]
    assert len({row.count(',') for row in (copied / 'summary.csv').read_text().splitlines()}) == 1
    assert run(other, copied, *more)['num_updates'] == 11  # they are those of the run now
    lr = {line['num_updates']: line['lr'] for line in lines}
    run(other, tmp_path / 'anew')
    assert [lr[5 + i] for i in range(1, 7)] == [line['lr'] for line in log_lines(tmp_path / 'anew')[6:]]


DAMAGES = {
    'empty': lambda path: path.write_bytes(b''),
    'cut': lambda path: os.truncate(path, path.stat().st_size // 2),
    'bit of a weight': lambda path: flip(path, 'data/5'),
    'bit of the pickle': lambda path: flip(path, 'data.pkl'),
    'text': lambda path: path.write_text('nothing'),
    'weights': lambda path: torch.save({'model': {'a': torch.zeros(2)}}, path),
    'not finite': lambda path: torch.save({**load(path), 'objective': {'a': torch.tensor([1., torch.inf])}}, path),
    'pipe': lambda path: (path.unlink(), os.mkfifo(path)),
}


def flip(path, name):
    """Flip a bit in the middle of an entry of a zip file."""
    with zipfile.ZipFile(path) as archive:
        entry = next(entry for entry in archive.infolist() if entry.filename.endswith(f'/{name}'))
        content = archive.read(entry)
    whole = bytearray(path.read_bytes())
    whole[whole.index(content) + len(content) // 2] ^= 1
    path.write_bytes(whole)


@pytest.mark.parametrize('damage', DAMAGES)
def test_damaged_checkpoint_is_named_and_the_one_before_is_used(damage, copied, capsys):
    DAMAGES[damage](copied / 'checkpoint-00000005.pt')
    with pytest.raises((RuntimeError, ValueError), match='checkpoint-00000005.pt'):
        load(copied / 'checkpoint-00000005.pt')
    folder = Checkpoints(copied, 2)
    path, _ = folder.newest('auto')
    told = capsys.readouterr().err
    assert path.name == 'checkpoint-00000004.pt' and 'checkpoint-00000005.pt is ' in told
    assert told.count('\n') == 1 and told.startswith('going on from the one before, because ') and '.;' not in told


def test_run_goes_on_from_the_checkpoint_before_and_keeps_the_damaged_one(data, left_alone, copied, capsys):
    flip(copied / 'checkpoint-00000005.pt', 'data/5')
    damaged = (copied / 'checkpoint-00000005.pt').read_bytes()
    run(data, copied, '--resume', 'auto', '--recovery-interval', '1')
    assert_same(weights(copied), weights(left_alone))
    assert losses(copied) == losses(left_alone)
    assert (copied / 'checkpoint-00000005.pt.unused').read_bytes() == damaged
    assert 'checkpoint-00000005.pt.unused' in capsys.readouterr().err


def test_without_a_whole_checkpoint_the_run_ends(data, copied):
    for path in Checkpoints(copied, 1).paths():
        flip(path, 'data/5')
    before = contents(copied)
    with pytest.raises(RuntimeError, match='checkpoint-00000001.pt is .*name another with --resume'):
        run(data, copied, '--resume', 'auto')
    with pytest.raises(RuntimeError, match='other.pt does not exist'):
        run(data, copied, '--resume', str(copied / 'other.pt'))
    assert before == contents(copied)


def test_named_checkpoint_is_gone_on_from_in_its_own_folder_or_a_new_one(data, copied, tmp_path):
    path = copied / 'checkpoint-00000003.pt'
    run(data, tmp_path / 'new', '--resume', str(path))
    with pytest.raises(ValueError, match='holds a run'):
        run(data, tmp_path / 'new', '--resume', str(path))
    run(data, copied, '--resume', str(path))
    assert_same(weights(copied), weights(tmp_path / 'new'))
    assert sorted(path.name for path in copied.glob('*.unused')) == [
        f'checkpoint-0000000{number}.pt.unused' for number in (4, 5)]
    (copied / 'checkpoint-00000008.pt').unlink()
    with pytest.raises(ValueError, match='holds the weights of a run'):
        run(data, copied, '--resume', 'auto')


def test_loss_that_is_not_finite_stops_the_run_and_keeps_the_batch(data, tmp_path, capsys):
    with pytest.raises(RuntimeError, match='The loss is nan in epoch .* Lower --lr'):
        run(data, tmp_path / 'run', '--lr', '1e30', '--clip-grad', '0', '--warmup-epochs', '0')
    batch = torch.load(tmp_path / 'run' / 'not_finite-0.pt', weights_only=True)
    assert batch['images'].shape == (4, 3, 64, 64) and batch['masked'].dtype == torch.bool
    assert capsys.readouterr().err.endswith('\n')  # of the progress bar, before the sentence


@pytest.mark.parametrize('last', [6, 8])
def test_weights_that_are_not_finite_are_not_written(last, data, copied, monkeypatch):
    """Not even after the last update; the advice works as it is typed."""
    update = Run._update

    def explode(self):
        update(self)
        if self.num_updates == last:
            self.averaged.patch_embed.proj.bias.data[0] = torch.inf

    more = ('--recovery-interval', '1', '--resume', 'auto')
    with monkeypatch.context() as patch:
        patch.setattr(Run, '_update', explode)
        with pytest.raises(RuntimeError, match=f'not finite after update {last}, which is not saved. Lower --lr'):
            run(data, copied, *more)
    assert Checkpoints(copied, 1).paths()[-1].name == f'checkpoint-0000000{last - 1}.pt'
    assert not list(copied.glob('pretrained*'))
    assert run(data, copied, *more, '--lr', '1e-4')['num_updates'] == 8


@pytest.mark.parametrize('num_bytes', [500, 64 * 1024, 'half a checkpoint'])
def test_full_disk_is_told_and_the_run_goes_on_when_there_is_room(num_bytes, data, copied, left_alone):
    """A limit on the size of files stands for it: to torch and safetensors it is the same error of the system."""
    if num_bytes == 'half a checkpoint':
        num_bytes = (copied / 'checkpoint-00000005.pt').stat().st_size // 2
    more = ('--recovery-interval', '1', '--resume', 'auto')
    before = contents(copied)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        with pytest.raises(RuntimeError, match='(too large|left on device). Free space there, then go on'):
            run(data, copied, *more)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert all(contents(copied)[name] == before[name] for name in before if name.startswith('checkpoint'))
    run(data, copied, *more)
    assert_same(weights(copied), weights(left_alone))
    assert losses(copied) == losses(left_alone)


def test_folder_has_one_run_at_a_time(data, copied, monkeypatch):
    monkeypatch.setattr(checkpoints, 'LOCK_TIMEOUT_S', 0)
    before = contents(copied)
    with filelock.FileLock(copied / '.lock'), pytest.raises(RuntimeError, match='Another run is at work in'):
        run(data, copied, '--resume', 'auto')
    assert before == contents(copied)


def test_unreadable_images_of_a_stream_are_skipped_and_counted(data, tmp_path, monkeypatch, capsys):
    images = [Image.new('F' if i == 3 else 'RGB', (40, 40)) for i in range(10)]

    class Stream:
        set_loader_cfg = set_epoch = lambda *_, **__: None
        __len__, __iter__ = lambda _: len(images), lambda _: ((image, 0) for image in images)

    monkeypatch.setattr('timm_itpn.pretrain.task.open_dataset', lambda *_, **__: Stream())
    assert run(data, tmp_path / 'run', '--batch-size', '5', '--workers', '1')['skipped'] == 4
    assert 'epoch 3: 1 images were skipped because they cannot be read, image 4 of worker 0' in capsys.readouterr().err


def test_unreadable_images_are_skipped_and_counted(tmp_path, capsys):
    data = write_images(tmp_path / 'data')
    (data / 'train' / 'class0' / '004.png').write_bytes(b'no image')
    result = run(data, tmp_path / 'run', '--batch-size', '5', '--workers', '1')
    assert result['skipped'] == 4 == log_lines(tmp_path / 'run')[-1]['skipped']  # once per epoch
    assert 'epoch 3: 1 images were skipped because they cannot be read, class0/004.png (Unid' in capsys.readouterr().err


@pytest.mark.parametrize('num_bad', [7, 10])
def test_run_ends_when_half_of_the_images_cannot_be_read(num_bad, tmp_path):
    data = write_images(tmp_path / 'data')
    for path in sorted(data.glob('train/*/*.png'))[:num_bad]:
        path.write_bytes(b'no image')
    with pytest.raises(RuntimeError, match=r'^More than half of .* cannot be read, class./00..png \(.*, \.\.\.: mend'):
        run(data, tmp_path / 'run', '--batch-size', '5', '--workers', '1')


def test_too_few_images_are_refused(data, tmp_path):
    with pytest.raises(ValueError, match='10 images are fewer than one update takes: 64'):
        run(data, tmp_path / 'run', '--batch-size', '64')


@pytest.mark.parametrize(('more', 'message'), [
    (('--mask-ratio', '0'), '0 masked tokens of a 4 x 4 grid: there must be at least 1, and at most 15'),
    (('--mask-ratio', '1'), '16 masked tokens of a 4 x 4 grid'),
    (('--teacher', TEACHER), 'The objective pixel takes no teacher: leave out --teacher'),
    (('--objective-kwargs', 'width=3'), "The objective pixel cannot be created: .*'width'"),
    (('--model-kwargs', 'foo=1'), "The student fast_itpn_tiny cannot be created: TypeError .*'foo'"),
    (('--model-kwargs', 'img_size=32'), "The student fast_itpn_tiny cannot be created: TypeError .*'img_size'"),
    (('--model-kwargs', 'features_only=True'), 'The student fast_itpn_tiny cannot be created: AttributeError'),
    (('--model-kwargs', 'checkpoint_path=/nosuch'), 'The student fast_itpn_tiny cannot be created: FileNotFoundError'),
    (('--objective-kwargs', 'student=3'), "The objective pixel cannot be created: TypeError .*'student'"),
    (('--teacher-path', 'nosuch'), '--teacher-path and .* are of a teacher: name it with --teacher'),
    (('--model-kwargs', 'depths=3'), 'The student fast_itpn_tiny cannot be created: TypeError'),
    (('--objective', 'clip', '--objective-kwargs', '--teacher', 'resnet18'), 'The teacher resnet18 cannot be created'),
    (('--objective', 'clip', '--objective-kwargs', '--teacher', 'nosuch'), 'The teacher nosuch cannot be created'),
    (('--epochs', '1', '--warmup-epochs', '5'), '--epochs 1 end within the warm-up: --warmup-epochs 5 must be fewer'),
    (('--train-interpolation', 'x'), '--scale, --ratio or --train-interpolation cannot be used'),
    (('--train-interpolation', 'nosuch'), '--scale, --ratio or --train-interpolation cannot be used'),
    (('--opt', 'nosuch'), 'nosuch'),
    (('--sched', 'nosuch'), 'nosuch'),
    (('--model-kwargs', 'pyramid=False'), 'The student has no feature pyramid'),
    (('--model-kwargs', 'dynamic_img_size=True'), 'The student has dynamic_img_size=True'),
    (('--model-kwargs', 'acceleration=light'), 'there are no windows: create the student without acceleration'),
    (('--model-kwargs', 'pyramid_concat=True'), 'The student has pyramid_concat=True'),
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


@pytest.mark.parametrize('damage', ['empty', 'cut', 'text', 'bit of a weight', 'pipe', 'not finite', 'of another'])
def test_damaged_files_of_teachers_are_named(damage, data, tmp_path):
    path = tmp_path / 'teacher.pth'
    state = timm.create_model(TEACHER).state_dict()
    if damage == 'of another':
        del state['norm.weight']
    if damage == 'not finite':
        state['norm.weight'][0] = torch.nan
    torch.save(state, path)
    with contextlib.suppress(KeyError):
        if damage != 'not finite':
            DAMAGES[damage](path)
    taught = ('--objective', 'clip', '--teacher', TEACHER, '--teacher-path', str(path))
    with pytest.raises((RuntimeError, ValueError), match='teacher') as error:
        run(data, tmp_path / 'run', objective=taught)
    assert '\n' not in str(error.value) and not (tmp_path / 'run').exists()


def test_short_command_is_enough(data, tmp_path, monkeypatch):
    """Device, objective and warm-up follow from what is there."""
    argv = command(data, tmp_path / 'run', '--epochs', '2')
    for option in ('--device', '--warmup-epochs', '--objective'):
        at = argv.index(option)
        del argv[at:at + 2]
    args = parse(argv)
    assert pretrain(args)['num_updates'] == 4
    settings = json.loads((tmp_path / 'run' / 'args.json').read_text())
    assert (settings['objective'], settings['warmup_epochs']) == ('pixel', 0)


def test_last_update_of_an_epoch_is_in_the_log(data, tmp_path):
    run(data, tmp_path / 'run', '--log-interval', '50', '--epochs', '2')
    assert [line['num_updates'] for line in log_lines(tmp_path / 'run')] == [2, 4]
