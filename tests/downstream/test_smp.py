"""Every architecture of segmentation_models_pytorch on our encoders; those that cannot work fail as listed here."""
import io

import pytest
import timm
import torch
from sklearn.datasets import load_sample_images
from support.small import official_weights

smp = pytest.importorskip('segmentation_models_pytorch', reason='segmentation_models_pytorch is not installed')

SMALL = dict(embed_dim=128, depths=(1, 1, 2), num_heads=2, dynamic_img_size=True)
STAGES, PYRAMID = 'tu-fast_itpn_tiny', 'tu-fast_itpn_tiny_fpn'
FOUR = dict(encoder_depth=4, decoder_channels=(64, 32, 32, 16))
DPT = dict(encoder_depth=3, decoder_intermediate_channels=(32, 64, 128), decoder_readout='ignore')
WORKS = [
    (STAGES, 'Unet', FOUR),
    (STAGES, 'UnetPlusPlus', FOUR),
    (STAGES, 'MAnet', FOUR),
    (STAGES, 'Linknet', dict(encoder_depth=4)),
    (STAGES, 'PSPNet', {}),
    (STAGES, 'PSPNet', dict(encoder_depth=4, upsampling=16)),
    (STAGES, 'PAN', dict(encoder_depth=4, encoder_output_stride=32)),  # 32: it then does not ask for another stride
    (STAGES, 'UPerNet', dict(encoder_depth=4)),
    (STAGES, 'Segformer', dict(encoder_depth=4)),
    (STAGES, 'DPT', DPT),
    (PYRAMID, 'Unet', {}),
    (PYRAMID, 'UnetPlusPlus', {}),
    (PYRAMID, 'MAnet', {}),
    (PYRAMID, 'Linknet', {}),
    (PYRAMID, 'FPN', {}),
    (PYRAMID, 'PSPNet', {}),
    (PYRAMID, 'PAN', dict(encoder_depth=4, encoder_output_stride=32)),
    (PYRAMID, 'UPerNet', {}),
    (PYRAMID, 'Segformer', {}),
]
UNUSED = {(STAGES, 'DPT'): ('head.norm.',), (PYRAMID, 'PSPNet'): ('pyramid.levels.0.',)}
FAILS = [
    (STAGES, 'Unet', {}, AssertionError, r'feature index 3 is out of range \(0 to 2\)'),
    (STAGES, 'Unet', dict(encoder_depth=4), ValueError,
     'Model depth is 4, but you provide `decoder_channels` for 5 blocks'),
    (STAGES, 'UPerNet', {}, AssertionError, r'feature index 3 is out of range \(0 to 2\)'),
    (STAGES, 'FPN', {}, AssertionError, r'feature index 3 is out of range \(0 to 2\)'),
    (STAGES, 'FPN', dict(encoder_depth=4), RuntimeError,
     r'size of tensor a \(256\) must match the size of tensor b \(0\) at non-singleton dimension 1'),
    (STAGES, 'DPT', {}, ValueError, 'got 4 depth, model has 3 blocks'),
    *[(encoder, architecture, {}, TypeError, "unexpected keyword argument 'output_stride'")
      for encoder in (STAGES, PYRAMID) for architecture in ('DeepLabV3', 'DeepLabV3Plus', 'PAN')],
    (PYRAMID, 'DeepLabV3Plus', dict(encoder_output_stride=32), ValueError, 'support output stride 8 or 16, got 32'),
]


@pytest.fixture(scope='module')
def photo():
    """Every third pixel of a part of the photograph, (1, 3, 128, 128), standardised."""
    params = smp.encoders.get_preprocessing_params(STAGES)
    x = torch.tensor(load_sample_images().images[0])[::3, ::3][:128, :128] / 255
    x = (x - torch.tensor(params['mean'])) / torch.tensor(params['std'])
    return x.permute(2, 0, 1)[None].float()


def segmenter(encoder, architecture, kwargs):
    return getattr(smp, architecture)(encoder, encoder_weights=None, classes=3, **SMALL, **kwargs)


def ids(rows):
    return [f'{row[1]}-{row[0]}-{"-".join(row[2])}' for row in rows]


def test_every_architecture_is_here():
    listed = {row[1] for row in WORKS + FAILS}
    assert listed == {architecture.__name__ for architecture in smp.MODEL_ARCHITECTURES_MAPPING.values()}


@pytest.mark.parametrize('encoder, architecture, kwargs', WORKS, ids=ids(WORKS))
def test_output_has_the_size_of_the_image(encoder, architecture, kwargs, photo):
    model = segmenter(encoder, architecture, kwargs)
    logits = model(photo.expand(2, -1, -1, -1))  # two, for the batch norm behind PSPNet's and PAN's pooling
    assert logits.shape == (2, 3, *photo.shape[2:])
    logits.square().mean().backward()
    unused = UNUSED.get((encoder, architecture), ())
    for name, parameter in model.encoder.named_parameters():
        if parameter.grad is None:
            assert unused and name.removeprefix('model.').removeprefix('model.').startswith(unused), name
        else:
            assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize('encoder, architecture, kwargs, error, message', FAILS, ids=ids(FAILS))
def test_known_limit_is_still_there(encoder, architecture, kwargs, error, message, photo):
    with pytest.raises(error, match=message):
        segmenter(encoder, architecture, kwargs)(photo)


def test_pretrained_weights_arrive(hub, small_models):
    buffer = io.BytesIO()
    torch.save(official_weights(num_classes=0, pyramid=True), buffer)
    hub.commit('xche32/RELO', {'pretrained/itpn/fast_itpn_tiny_1600e_1k.pt': buffer.getvalue()})
    encoder = smp.UPerNet(PYRAMID, encoder_weights=True).encoder.model.state_dict()
    expected = timm.create_model('fast_itpn_tiny_fpn', pretrained=True, features_only=True).state_dict()
    assert encoder and all(torch.equal(value, expected[key]) for key, value in encoder.items())
