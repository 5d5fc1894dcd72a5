"""Figures of features and of leaving tokens: what is drawn, from which weights, and that a failure leaves nothing."""
import sys
from types import SimpleNamespace

import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from support.small import official_weights

from timm_itpn.cli import main, show, show_figures

pytestmark = pytest.mark.usefixtures('one_thread')

SMALL = ['--img-size', '64', '96']


@pytest.fixture
def photo(tmp_path, monkeypatch):
    """A photograph of 427 x 640 pixels, in the current folder."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / 'flower.jpg'
    Image.fromarray(load_sample_images().images[1]).save(path)
    return path


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are written, as a list that fills."""
    found = []
    save = show.save_figure
    monkeypatch.setattr(show, 'save_figure', lambda figure, path: found.append(figure) or save(figure, path))
    return found


def titles(figure):
    return [axes.get_title() for axes in figure.axes]


def test_stages_and_pyramid_are_drawn(photo, drawn, capsys):
    assert main(['show', str(photo), *SMALL]) == 0
    captured = capsys.readouterr()
    assert captured.out == 'flower_show.png\n'
    assert 'fast_itpn_tiny_fpn has random weights (seed 0)' in captured.err
    assert sorted(titles(drawn[0])) == [
        'image\n64 x 96 pixels',
        'pyramid level 1, stride 4\n16 x 24, 256 channels',
        'pyramid level 2, stride 8\n8 x 12, 256 channels',
        'pyramid level 3, stride 16\n4 x 6, 256 channels',
        'pyramid level 4, stride 32\n2 x 3, 256 channels',
        'pyramid level 5, stride 64\n1 x 2, 256 channels',
        'stage 1, stride 4\n16 x 24, 96 channels',
        'stage 2, stride 8\n8 x 12, 192 channels',
        'stage 3, stride 16\n4 x 6, 384 channels',
    ]
    picture = Image.open('flower_show.png')
    assert picture.format == 'PNG' and picture.size[0] > 1000


def test_model_without_pyramid_has_stages_only(photo, drawn, monkeypatch):
    monkeypatch.setattr(show, 'LONGEST_SIDE', 64)
    argv = ['--model', 'fast_itpn_tiny', '--output', 'x.png', '--seed', '3', '--acceleration', 'light']
    assert main(['show', str(photo), *argv, '--gather-window', '2']) == 0
    assert sorted(titles(drawn[0]))[::3] == ['image\n48 x 64 pixels', 'stage 3, stride 16\n3 x 4, 384 channels']
    assert 'fast_itpn_tiny, acceleration light, random weights (seed 3)' in drawn[0].get_suptitle()


@pytest.mark.parametrize(('own', 'expected'), [((640, 427), (304, 448)), ((100, 60), (64, 96)), ((3000, 5), (16, 448))])
def test_own_size_is_kept_up_to_multiples_of_16(own, expected):
    assert show.own_size(*own) == expected


def test_maps_are_those_of_the_model():
    torch.manual_seed(0)
    model = timm.create_model('itpn_tiny_fpn', pyramid=True, num_classes=0, img_size=(48, 64)).eval()
    images = torch.randn(1, 3, 48, 64)
    with torch.inference_mode():
        maps = show_figures.feature_maps(model, images)
        top, levels = model.forward_intermediates(images, output_fmt='NHWC')
    assert torch.equal(maps['stage 3'], top[0])
    assert all(torch.equal(maps[f'pyramid level {i}'], level[0]) for i, level in enumerate(levels, 1))


def test_colours_are_the_components_of_a_known_map():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(24, 3, generator=generator)
    scores = torch.linalg.qr(scores - scores.mean(dim=0))[0] * torch.tensor([9., 5., 2.])  # uncorrelated, mean 0
    directions = torch.linalg.qr(torch.randn(16, 3, generator=generator))[0]
    features = (scores @ directions.T + torch.randn(16, generator=generator)).reshape(4, 6, 16)
    colours = show_figures.colours(features, tail=0.)
    assert colours.shape == (4, 6, 3) and torch.equal(colours, show_figures.colours(features, tail=0.))
    low, high = scores.min(dim=0).values, scores.max(dim=0).values
    expected = ((scores - low) / (high - low)).reshape(4, 6, 3)
    error = torch.minimum((colours - expected).abs().amax((0, 1)), (1 - colours - expected).abs().amax((0, 1)))
    assert error.max() < 1e-4  # a component may point either way

    rank_1 = show_figures.colours(scores[:, :1].mul(directions[:, 0]).reshape(4, 6, 16))
    assert rank_1[..., 0].std() > 0.1 and (rank_1[..., 1:] == 0.5).all()


@pytest.mark.parametrize('features', [torch.full((4, 6, 8), 0.1), torch.rand(1, 1, 8), torch.zeros(2, 1, 8)])
def test_maps_without_variation_are_grey(features):
    assert (show_figures.colours(features) == 0.5).all()


def test_checkpoint_is_used(photo, capsys, small_models):
    state_dict = official_weights(num_classes=0, pyramid=True)
    torch.save({'model': state_dict}, 'mim.pt')
    pictures = []
    for seed in '01':
        argv = ['show', str(photo), '--checkpoint', 'mim.pt', '--output', f'{seed}.png', '--seed', seed, *SMALL]
        assert main(argv) == 0
        pictures.append(Image.open(f'{seed}.png').tobytes())
    assert 'random' not in capsys.readouterr().err
    assert pictures[0] == pictures[1]

    args = SimpleNamespace(
        model='fast_itpn_tiny_fpn', checkpoint=photo.with_name('mim.pt'), pretrained=False, pyramid_init='pretrained',
        device='cpu', seed=0, acceleration=None, gather_window=None)
    model, weights = show.build(args, (64, 96))
    assert weights == 'weights of mim.pt' and not model.training
    assert torch.equal(model.patch_embed.proj.weight, state_dict['patch_embed.proj.weight'])
    assert torch.equal(model.pyramid.norm.weight, state_dict['norm.weight'])


def test_checkpoint_without_pyramid_is_refused_unless_a_random_one_is_asked_for(photo, drawn, capsys, small_models):
    state_dict = official_weights(num_classes=1000)
    torch.save(state_dict, 'classifier.pt')
    argv = ['show', str(photo), '--checkpoint', 'classifier.pt', *SMALL]
    assert main(argv) == 1
    assert "pyramid_init='random'" in capsys.readouterr().err
    assert main([*argv, '--pyramid-init', 'random']) == 0
    assert 'weights of classifier.pt, pyramid random if it has none' in drawn[0].get_suptitle()


def test_nothing_is_overwritten_unless_forced(photo, capsys):
    (photo.parent / 'flower_show.png').write_text('mine')
    argv = ['show', str(photo), '--model', 'fast_itpn_tiny', '--img-size', '16']
    assert main(argv) == 1
    assert 'flower_show.png exists already: overwrite it with --force' in capsys.readouterr().err
    assert (photo.parent / 'flower_show.png').read_text() == 'mine'
    assert main([*argv, '--force']) == 0
    assert Image.open('flower_show.png').format == 'PNG'


@pytest.mark.parametrize(('change', 'message'), [
    (['--model', 'itpn_tiny', '--pretrained'], 'itpn_tiny has no published weights'),
    (['--tokens'], 'no token leaves, so there is nothing to draw: add --acceleration full'),
])
def test_mistakes_are_one_sentence_and_leave_nothing_behind(photo, capsys, change, message):
    assert main(['show', str(photo), *SMALL, *change]) == 1
    captured = capsys.readouterr()
    last = captured.err.splitlines()[-1]
    assert captured.out == '' and last.startswith('timm-itpn: ') and message in last
    assert [path.name for path in photo.parent.iterdir()] == ['flower.jpg']


def test_files_that_are_not_images_are_refused(photo, capsys):
    (photo.parent / 'notes.txt').write_text('no image')
    (photo.parent / 'cut.jpg').write_bytes(photo.read_bytes()[:5000])
    for name, message in [
        ('absent.jpg', 'absent.jpg cannot be read as an image: '),
        ('notes.txt', 'notes.txt cannot be read as an image'),
        ('cut.jpg', 'cut.jpg cannot be read as an image: image file is truncated'),
        ('.', '. is a folder: name a file'),
    ]:
        assert main(['show', name, '--output', 'x.png']) == 1
        assert f'timm-itpn: {message}' in capsys.readouterr().err


def test_images_are_read_upright_and_in_colour(tmp_path):
    Image.new('L', (6, 4), 100).save(tmp_path / 'grey.png')
    Image.new('I;16', (6, 4), 100 * 257).save(tmp_path / 'grey_16.png')
    Image.new('RGBA', (6, 4), (10, 20, 30, 128)).save(tmp_path / 'rgba.png')
    Image.new('P', (6, 4)).save(tmp_path / 'palette.gif')
    rotated = Image.new('RGB', (6, 4))
    exif = rotated.getexif()
    exif[0x0112] = 6  # orientation: the camera was turned by 90 degrees
    rotated.save(tmp_path / 'rotated.jpg', exif=exif)
    sizes = {path.name: show.read_image(path).size for path in tmp_path.iterdir()}
    assert sizes.pop('rotated.jpg') == (4, 6)
    assert len(sizes) == 4 and set(sizes.values()) == {(6, 4)}
    assert show.read_image(tmp_path / 'rgba.png').getpixel((0, 0)) == (10, 20, 30)
    for name in ('grey.png', 'grey_16.png'):
        assert show.read_image(tmp_path / name).getpixel((0, 0)) == (100, 100, 100)


@pytest.mark.parametrize('command', ['show', 'demo', 'convert', 'inspect', 'list', 'recipe'])
def test_help_needs_no_heavy_imports(command, monkeypatch, capsys):
    for name in ('torch', 'timm', 'matplotlib', 'PIL'):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as stop:
        main([command, '--help'])
    assert stop.value.code == 0 and f'usage: timm-itpn {command}' in capsys.readouterr().out


def test_tokens_that_leave_are_drawn(photo, drawn, capsys):
    assert main(['show', str(photo), *SMALL, '--acceleration', 'full', '--gather-window', '3', '--tokens']) == 0
    assert capsys.readouterr().out == 'flower_tokens.png\n'
    assert 'fast_itpn_tiny_fpn, acceleration full, random weights' in drawn[0].get_suptitle()
    assert titles(drawn[0]) == [
        '4 windows', 'block 1: 4 leave', 'block 3: 4 leave', 'block 4: 4 leave', '12 of 24 stay']
    assert [len(axes.get_lines()) for axes in drawn[0].axes] == [8, 12, 12, 12, 8]  # of windows, and to partners
    assert Image.open('flower_tokens.png').format == 'PNG'


def test_departures_are_those_of_the_model():
    model = timm.create_model('fast_itpn_tiny', img_size=(64, 96), migrate={0: 2, 3: 1}).eval()
    departed = []
    for block in model.stages[2].blocks:
        block.register_forward_hook(lambda module, args, output: departed.append(output[2]))
    left = show_figures.departures(model, torch.randn(1, 3, 64, 96))
    assert {block: group.positions.numel() for block, group in left.items()} == {0: 2, 3: 1}
    assert all(group is departed[block] for block, group in left.items())
