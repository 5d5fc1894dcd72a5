"""Cases: sizes as users write them, what a case is called, and what can be measured."""
import pytest
import timm

from timm_itpn.bench.cases import PEERS, Asked, Case, check, parse_size


@pytest.mark.parametrize('text, size', [('224', (224, 224)), ('800x1344', (800, 1344)), ('64x032', (64, 32))])
def test_size_is_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize('text', ['', 'x', '224x', 'x224', '-16', '16.0', '16x16x16', '16 x 16', '800X1344'])
def test_text_that_is_not_a_size_is_refused(text):
    with pytest.raises(ValueError, match=r'is not usable: give a side such as 224, or HEIGHTxWIDTH such as 800x1344$'):
        parse_size(text)


@pytest.mark.parametrize('changes', [dict(mode='forward'), dict(pyramid=False), dict(img_size=(32, 48))])
def test_step_of_pre_training_needs_training_pyramid_and_squares(changes):
    case = dict(model='fast_itpn_tiny', img_size=(32, 32), batch=2, mode='train', pyramid=True)
    check(Case(**case), Asked(objective='clip'))
    with pytest.raises(ValueError, match='^a step of pre-training needs square images and the pyramid'):
        check(Case(**{**case, **changes}), Asked(objective='clip'))


@pytest.mark.parametrize(('changes', 'asked', 'message'), [
    (dict(templates=1, pyramid=True), {}, 'templates have half the side'),
    (dict(templates=1, img_size=(64, 80)), {}, 'multiples of 32'),
    (dict(templates=1), dict(peers=('test_vit',)), 'leave out --peers'),
    (dict(mode='train'), dict(onnx=True), 'ONNX Runtime is measured'),
    (dict(dtype='bfloat16'), dict(onnx=True), 'leave out --onnx'),
])
def test_what_cannot_be_measured_together_is_refused(changes, asked, message):
    with pytest.raises(ValueError, match=message):
        check(Case(**{'img_size': (64, 64), **changes}), Asked(**asked))


def test_case_says_what_it_is():
    assert str(Case('fast_itpn_tiny', (32, 32), 2)) == 'fast_itpn_tiny, forward, 32 px, batch 2, float32'
    assert str(Case(templates=2)).startswith('fast_itpn_base, templates 2, forward, 224 px')
    case = Case('fast_itpn_tiny', (800, 1344), 2, mode='train', pyramid=True)
    assert str(case) == 'fast_itpn_tiny, pyramid, train, 800x1344 px, batch 2, float32'


def test_peers_are_models_of_timm():
    assert all(map(timm.is_model, PEERS))
