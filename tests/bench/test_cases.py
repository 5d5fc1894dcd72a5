"""Cases: sizes as users write them, what a case is called, and what cannot be measured."""
import pytest

from timm_itpn.acceleration import schedule
from timm_itpn.bench.cases import ACCELERATIONS, Case, Rivals, Rounds, check, height_width, parse_size

CASE = Case('fast_itpn_tiny', 32, 2)


@pytest.mark.parametrize('text, size, sides', [
    ('224', 224, (224, 224)),
    ('800x1344', '800x1344', (800, 1344)),
    ('64x032', '64x32', (64, 32)),
    ('224x224', 224, (224, 224)),
])
def test_size_is_read(text, size, sides):
    assert parse_size(text) == size and type(parse_size(text)) is type(size)
    assert height_width(size) == sides
    assert parse_size(str(size)) == size


@pytest.mark.parametrize('text', ['', 'x', '224x', 'x224', '-16', '16.0', '16x16x16', '16 x 16', '800X1344'])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError) as error:
        parse_size(text)
    assert str(error.value) == (
        f'size {text} is not usable: give a side such as 224, or HEIGHTxWIDTH such as 800x1344')


@pytest.mark.parametrize('size, message', [
    (100, '^size 100 is not usable: it must be a multiple of 16$'),
    (0, '^size 0 is not usable: it must be'),
    (-16, '^size -16 is not usable: give a side'),
    ('800x1340', '^size 800x1340 is not usable: each side must be a multiple of 16$'),
    ('8x1344', '^size 8x1344 is not usable: each side must be'),
    ('0x32', '^size 0x32 is not usable: each side must be'),
    ('large', '^size large is not usable: give a side'),
])
def test_size_that_no_model_takes_is_refused(size, message):
    with pytest.raises(ValueError, match=message):
        check(CASE._replace(size=size), Rivals(), Rounds(), 'cpu')


def test_case_that_can_be_measured_passes():
    case = CASE._replace(size='32x48', pyramid=True)
    check(case, Rivals(baseline=True, fuse=True, accelerations=ACCELERATIONS), Rounds(3, 1), 'cpu')


def test_pyramid_has_no_peers():
    with pytest.raises(ValueError, match='^the peers are classifiers, which a pyramid cannot be compared with'):
        check(CASE._replace(pyramid=True), Rivals(peers=('test_vit',)), Rounds(), 'cpu')


@pytest.mark.parametrize('changes', [dict(mode='forward'), dict(pyramid=False), dict(size='32x48')])
def test_step_of_pre_training_is_with_pyramid_and_on_squares(changes):
    case = CASE._replace(mode='train', pyramid=True)
    check(case, Rivals(objective='clip'), Rounds(), 'cpu')
    with pytest.raises(ValueError, match='^a step of pre-training is one of training, on squares and with the pyramid'):
        check(case._replace(**changes), Rivals(objective='clip'), Rounds(), 'cpu')


def test_accelerations_are_those_of_the_models():
    assert ACCELERATIONS == tuple(schedule.ACCELERATIONS)
    with pytest.raises(ValueError, match="^acceleration 'more' is unknown, choose one of: light, full$"):
        check(CASE, Rivals(accelerations=('light', 'more')), Rounds(), 'cpu')


def test_case_says_what_it_is():
    assert str(CASE) == 'fast_itpn_tiny, forward, 32 px, batch 2, float32'
    case = CASE._replace(size='800x1344', pyramid=True, mode='train', grad_checkpointing=True)
    assert str(case) == (
        'fast_itpn_tiny, pyramid, train, 800x1344 px, batch 2, float32, gradient checkpointing')
