"""Pictures of features: what is drawn, from which weights, and that a failure leaves nothing behind."""
import sys
from types import SimpleNamespace

import pytest
import timm
import torch
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_sample_images
from support import golden

from timm_itpn.cli import main, show

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
def figures(monkeypatch):
    """The figures that are drawn, as a list that fills."""
    drawn = []
    draw = show.draw

    def keep(*args):
        drawn.append(draw(*args))
        return drawn[-1]

    monkeypatch.setattr(show, 'draw', keep)
    return drawn


def titles(figure):
    return [axes.get_title() for axes in figure.axes]


def test_stages_and_pyramid_are_drawn(photo, figures, capsys):
    assert main(['show', str(photo), *SMALL]) == 0
    captured = capsys.readouterr()
    assert captured.out == 'flower_show.png\n'
    assert 'fast_itpn_tiny_fpn has random weights (seed 0)' in captured.err
    assert titles(figures[0]) == [
        'stage 1, stride 4\n16 x 24, 96 channels',
        'stage 2, stride 8\n8 x 12, 192 channels',
        'stage 3, stride 16\n4 x 6, 384 channels',
        'image\n64 x 96 pixels',
        'pyramid level 1, stride 4\n16 x 24, 256 channels',
        'pyramid level 2, stride 8\n8 x 12, 256 channels',
        'pyramid level 3, stride 16\n4 x 6, 256 channels',
        'pyramid level 4, stride 32\n2 x 3, 256 channels',
        'pyramid level 5, stride 64\n1 x 2, 256 channels',
    ]
    picture = Image.open('flower_show.png')
    assert picture.format == 'PNG' and picture.size[0] > 1000


def test_model_without_pyramid_has_stages_only(photo, figures, monkeypatch):
    monkeypatch.setattr(show, 'LONGEST_SIDE', 64)
    assert main(['show', str(photo), '--model', 'fast_itpn_tiny', '--output', 'x.png', '--seed', '3']) == 0
    assert titles(figures[0])[2:] == ['stage 3, stride 16\n3 x 4, 384 channels', 'image\n48 x 64 pixels']
    assert 'fast_itpn_tiny, random weights (seed 3)' in figures[0].get_suptitle()


@pytest.mark.parametrize(('asked', 'own', 'expected'), [
    (None, (640, 427), (304, 448)),
    (None, (427, 640), (448, 304)),
    (None, (100, 60), (64, 96)),
    (None, (3000, 5), (16, 448)),
    ([64], (640, 427), (64, 64)),
    ([64, 96], (640, 427), (64, 96)),
])
def test_image_size(asked, own, expected):
    assert show.image_size(asked, own) == expected


def test_maps_are_those_of_the_model(photo):
    torch.manual_seed(0)
    model = timm.create_model('itpn_tiny_fpn', pyramid=True, num_classes=0, img_size=(48, 64)).eval()
    image = show.read_image(photo)
    pixels, shown = show.prepare(image, model, (48, 64))
    with torch.inference_mode():
        maps = show.feature_maps(model, pixels)
        top, levels = model.forward_intermediates(pixels, output_fmt='NHWC')
    assert torch.equal(maps[2].values, top[0])
    assert all(torch.equal(feature_map.values, level[0]) for feature_map, level in zip(maps[3:], levels))
    assert [feature_map.stride for feature_map in maps] == [4, 8, 16, 4, 8, 16, 32, 64]
    whole = torch.tensor(list(image.resize((64, 48), Image.Resampling.BICUBIC).tobytes())).reshape(48, 64, 3)
    assert (shown * 255 - whole).abs().max() < 1e-3


def test_components_are_those_of_a_known_map():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(24, 3, generator=generator)
    scores = torch.linalg.qr(scores - scores.mean(dim=0))[0] * torch.tensor([9., 5., 2.])  # uncorrelated, mean 0
    directions = torch.linalg.qr(torch.randn(16, 3, generator=generator))[0]
    directions = directions * directions.gather(0, directions.abs().argmax(dim=0, keepdim=True)).sign()
    features = (scores @ directions.T + torch.randn(16, generator=generator)).reshape(4, 6, 16)
    components = show.principal_components(features)
    assert (components.flatten(0, 1) - scores).abs().max() < 1e-4

    rank_1 = show.principal_components(scores[:, :1].mul(directions[:, 0]).reshape(4, 6, 16))
    assert rank_1[..., 0].std() > 1 and (rank_1[..., 1:] == 0).all()


@pytest.mark.parametrize('features', [torch.full((4, 6, 8), 0.1), torch.rand(1, 1, 8), torch.zeros(2, 1, 8)])
def test_maps_without_variation_are_grey(features):
    assert (show.to_colours(show.principal_components(features)) == 0.5).all()


def test_two_positions_are_told_apart():
    colours = show.to_colours(show.principal_components(torch.rand(1, 2, 8)))
    assert sorted(colours[0, :, 0].tolist()) == [0, 1] and (colours[..., 1:] == 0.5).all()


def test_broken_features_are_refused():
    with pytest.raises(ValueError, match='the features are not finite'):
        show.principal_components(torch.full((2, 2, 8), float('nan')))


def test_checkpoint_is_used(photo, capsys):
    state_dict = golden.official_state_dict(golden.load('fast_itpn_tiny_mim'), torch.float32)
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


def test_checkpoint_without_pyramid_is_refused_unless_a_random_one_is_asked_for(photo, figures, capsys):
    state_dict = golden.official_state_dict(golden.load('fast_itpn_tiny'), torch.float32)
    torch.save(state_dict, 'classifier.pt')
    argv = ['show', str(photo), '--checkpoint', 'classifier.pt', *SMALL]
    assert main(argv) == 1
    assert "pyramid_init='random'" in capsys.readouterr().err
    assert main([*argv, '--pyramid-init', 'random']) == 0
    assert 'weights of classifier.pt, pyramid random if it has none' in figures[0].get_suptitle()


def test_nothing_is_overwritten_unless_forced(photo, capsys):
    (photo.parent / 'flower_show.png').write_text('mine')
    argv = ['show', str(photo), '--model', 'fast_itpn_tiny', '--img-size', '16']
    assert main(argv) == 1
    assert 'flower_show.png exists already' in capsys.readouterr().err
    assert (photo.parent / 'flower_show.png').read_text() == 'mine'
    assert main([*argv, '--force']) == 0
    assert Image.open('flower_show.png').format == 'PNG'


@pytest.mark.parametrize(('error', 'status'), [(OSError('No space left'), 1), (KeyboardInterrupt, 130)])
def test_failed_write_leaves_nothing_behind(photo, monkeypatch, error, status):
    def half_written(figure, path, **kwargs):
        path.write_bytes(b'\x89PNG')
        raise error

    monkeypatch.setattr(Figure, 'savefig', half_written)
    assert main(['show', str(photo), '--model', 'fast_itpn_tiny', '--img-size', '16']) == status
    assert [path.name for path in photo.parent.iterdir()] == ['flower.jpg']


@pytest.mark.parametrize(('change', 'message'), [
    (['--model', 'resnet50'], "there is no model 'resnet50'; there are: fast_itpn_base"),
    (['--model', 'fast_itpn_tiny.none'], 'none'),
    (['--model', 'itpn_tiny', '--pretrained'], 'itpn_tiny has no published weights'),
    (['--checkpoint', 'none.pt'], 'none.pt does not exist'),
    (['--img-size', '20'], 'both sides must be multiples of 16'),
    (['--img-size', '3', '64', '96'], '--img-size takes one or two numbers, not 3'),
    (['--output', 'x.jpg'], 'x.jpg is no name of a PNG file'),
    (['--output', 'none/x.png'], 'there is no folder none'),
    (['--device', 'abacus'], "device 'abacus' cannot be used"),
])
def test_mistakes_are_one_sentence_and_leave_nothing_behind(photo, capsys, change, message):
    assert main(['show', str(photo), *SMALL, *change]) == 1
    captured = capsys.readouterr()
    last = captured.err.splitlines()[-1]
    assert captured.out == '' and last.startswith('timm-itpn: ') and message in last
    assert [path.name for path in photo.parent.iterdir()] == ['flower.jpg']


def test_files_that_are_no_images_are_refused(photo, capsys):
    (photo.parent / 'notes.txt').write_text('no image')
    (photo.parent / 'cut.jpg').write_bytes(photo.read_bytes()[:5000])
    for name, message in [
        ('absent.jpg', 'absent.jpg does not exist'),
        ('notes.txt', 'notes.txt cannot be read as an image'),
        ('cut.jpg', 'cut.jpg cannot be read as an image: image file is truncated'),
        ('.', '. cannot be read as an image'),
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


def test_missing_matplotlib_is_named(photo, monkeypatch, capsys):
    monkeypatch.setattr(show, 'REQUIRES', ('absent_package',))
    assert main(['show', str(photo)]) == 1
    assert "show needs absent_package: pip install 'timm-itpn[demo]'" in capsys.readouterr().err


def test_help_needs_no_heavy_imports(monkeypatch, capsys):
    for name in ('torch', 'timm', 'matplotlib', 'PIL'):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as stop:
        main(['show', '--help'])
    assert stop.value.code == 0 and '--img-size H [W ...]' in capsys.readouterr().out


# which tokens leave

def test_tokens_that_leave_are_drawn(photo, monkeypatch, capsys):
    drawn = []
    draw = show.tokens_figure.draw
    monkeypatch.setattr(show.tokens_figure, 'draw', lambda *args: drawn.append((args, draw(*args))) or drawn[-1][1])
    assert main(['show', str(photo), *SMALL, '--acceleration', 'full', '--gather-window', '3', '--tokens']) == 0
    assert capsys.readouterr().out == 'flower_tokens.png\n'
    (shown, left, caption), figure = drawn[0]
    assert 'fast_itpn_tiny_fpn, acceleration full, random weights' in caption
    assert shown.shape == (64, 96, 3) and left.block.shape == (4, 6)
    assert left.window.tolist() == [[0, 0, 0, 1, 1, 1]] * 2 + [[2, 2, 2, 3, 3, 3]] * 2
    assert titles(figure) == ['4 windows', 'block 1: 4 leave', 'block 3: 4 leave', 'block 4: 4 leave', '12 of 24 stay']
    assert Image.open('flower_tokens.png').format == 'PNG'


def test_departures_are_those_of_the_model():
    model = timm.create_model('fast_itpn_tiny', img_size=64, migrate={0: 2, 3: 1}).eval()
    places = []
    for block in model.stages[2].blocks:
        block.register_forward_hook(lambda module, args, output: places.append(output[3].flatten().tolist()))
    left = show.tokens_figure.departures(model, torch.randn(1, 3, 64, 64))
    assert left.depth == 12 and (left.window == 0).all()
    blocks = left.block.flatten()
    assert [(blocks == i).nonzero().flatten().tolist() for i in (0, 3)] == [sorted(places[0]), places[3]]
    assert (blocks == 12).sum() == 13


@pytest.mark.parametrize('args', [[], ['--acceleration', 'light']])
def test_tokens_without_migration_are_refused(args, photo, capsys):
    assert main(['show', str(photo), *SMALL, '--tokens', *args]) == 1
    assert 'no token leaves, so there is nothing to draw: add --acceleration full' in capsys.readouterr().err
    assert not list(photo.parent.glob('*.png'))


def test_features_of_an_accelerated_model_are_drawn(photo, figures):
    assert main(['show', str(photo), *SMALL, '--acceleration', 'light', '--gather-window', '2']) == 0
    assert 'acceleration light' in figures[0].get_suptitle()
