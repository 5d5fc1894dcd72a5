"""The command `timm-itpn pretrain`, its YAML files and the recipes."""
import json
import os

import pytest
import yaml
from support.pretrain_runs import command, parse, write_images

from timm_itpn.cli import main
from timm_itpn.cli.recipe import RECIPES
from timm_itpn.pretrain.objectives import OBJECTIVES, create_student

NAMES = ('pretrain_fast_itpn', 'pretrain_itpn_clip', 'pretrain_itpn_pixel', 'pretrain_mfm')


def test_command_runs_and_tells_what_it_wrote(tmp_path, capsys):
    data = write_images(tmp_path / 'data')
    path = tmp_path / 'some.yaml'
    path.write_text('epochs: 1\nscale: [0.5, 1]\nmodel_kwargs: {init_values: 0.1}\n')
    more = ('-c', str(path), '--epochs', '1', '--warmup-epochs', '0')
    assert main(['pretrain', *command(data, tmp_path / 'run', *more)]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result['num_updates'] == 2 and (tmp_path / 'run' / 'pretrained.pth').samefile(result['official'])
    assert json.loads((tmp_path / 'run' / 'args.json').read_text())['scale'] == [0.5, 1]
    assert 'loss=' in captured.err and 'images_per_s=' in captured.err


def test_errors_are_one_sentence(tmp_path, capsys):
    assert main(['pretrain', *command(tmp_path / 'nowhere', tmp_path / 'run')]) == 1
    captured = capsys.readouterr()
    assert captured.out == '' and captured.err.splitlines()[-1].startswith('timm-itpn: There is no --data-dir')


def test_file_gives_defaults_and_the_command_line_wins(tmp_path):
    path = tmp_path / 'some.yaml'
    path.write_text("epochs: 7\nlr: 0.5\nmodel_kwargs: {depths: [1, 1, 2], a: 'x y'}\ndata_dir: some/where\namp: true\n"
                    'model_ema: false\nteacher: null\nscale: [0.1, 1]\n')
    for argv in (['-c', str(path), '--lr', '0.25'], ['--lr', '0.25', '-c', str(path)]):
        args = parse(argv)
        assert (args.epochs, args.lr, args.model_kwargs) == (7, 0.25, {'depths': [1, 1, 2], 'a': 'x y'})
        assert (args.amp, args.model_ema, args.teacher, args.scale) == (True, False, None, [0.1, 1])
        assert args.data_dir.parts == ('some', 'where') and args.batch_size == 128


@pytest.mark.parametrize(('text', 'message'), [
    ('epoch: 7', 'has settings that do not exist: epoch; see'),
    ('- 7', 'does not hold settings'),
    ('a: b: c', 'cannot be read'),
    (None, 'not a regular file'),
    ('epochs: many', "--epochs: invalid int value: 'many'"),
    ('epochs: 0', '--epochs: 0 is not usable: give a number from 1 on'),
    ('epochs: true', '--epochs: expected one argument'),
    ('epochs: null', 'epochs cannot be None'),
    ('model_ema: "no"', "--model-ema: ignored explicit argument 'no'"),
    ('objective: some', "--objective: invalid choice: 'some'"),
    ('scale: 0.2', '--scale: expected 2 arguments'),
    ('model_kwargs: 3', "'3' is not an argument: write KEY=VALUE"),
])
def test_bad_files_are_refused(text, message, tmp_path, capsys):
    path = tmp_path / 'some.yaml'
    if text is None:
        os.mkfifo(path)
    else:
        path.write_text(text)
    with pytest.raises(SystemExit) as error:
        main(['pretrain', '-c', str(path)])
    assert error.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize('name', NAMES)
def test_recipes_are_settings_of_a_run(name):
    text = (RECIPES / f'{name}.yaml').read_text()
    args = parse(['-c', str(RECIPES / f'{name}.yaml')])
    assert all(getattr(args, key) == value for key, value in yaml.safe_load(text).items())
    objective = OBJECTIVES[args.objective]
    assert objective.TEACHER == (args.teacher is not None) and objective.MASKING == args.masking
    student = create_student(args.model, args.objective, args.img_size, device='meta')
    assert student.family in objective.STUDENT
    assert args.mask_ratio in (None, objective.MASK_RATIO)


def test_numbers_are_those_of_the_authors():
    args = parse(['-c', str(RECIPES / 'pretrain_fast_itpn.yaml')])
    assert (args.epochs, args.warmup_epochs, args.lr, args.min_lr, args.weight_decay) == (1600, 10, 1.5e-3, 1e-5, 0.05)
    assert (args.opt_betas, args.opt_eps, args.clip_grad, args.drop_path) == ([0.9, 0.98], 1e-8, 3, 0.1)
    assert args.scale == [0.2, 1] and 8 * args.batch_size == 2048
    args = parse(['-c', str(RECIPES / 'pretrain_itpn_pixel.yaml')])
    assert (args.epochs, args.warmup_epochs, args.lr_base, args.lr_base_size) == (1600, 40, 1.5e-4, 256)
    assert (args.opt_betas, args.weight_decay, args.mask_ratio) == ([0.9, 0.95], 0.05, 0.75)
