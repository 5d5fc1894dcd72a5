"""Exporters and runtimes take images of any size, and the table of `models/EXPORT.md` says which, and where not."""
import importlib.util
from itertools import product
from pathlib import Path

import pytest
import torch
from support.onnx_runtime import load_onnx
from support.small import images, small_model

import timm_itpn.models
from timm_itpn.bench.rows import table

PAGE = Path(timm_itpn.models.__file__).with_name('EXPORT.md')
BUILT_FOR, EXAMPLE = 96, (2, 3, 160, 96)  # pixels; the example has another size than the model is built for
OTHER_SIZES = ((2, 3, 96, 160), (3, 3, 96, 96), (1, 3, 80, 112))
MODELS = {  # by column
    'Fast-iTPN': dict(name='fast_itpn_tiny'),
    'Fast-iTPN `_fpn`': dict(name='fast_itpn_tiny_fpn', features_only=True),
    'iTPN, HiViT': dict(name='itpn_tiny'),
    'iTPN `_fpn`': dict(name='itpn_tiny_fpn', features_only=True),
    'with acceleration': dict(
        name='fast_itpn_tiny', depths=(1, 1, 2), acceleration='full', gather_window=4, migrate={0: 0.3}),
}


def shapes():
    """For `torch.export`: any batch, and sides that are multiples of 16."""
    height, width = (torch.export.Dim(name, min=5, max=16) for name in ('height', 'width'))
    return {'x': {0: torch.export.Dim('batch', min=1, max=8), 2: 16 * height, 3: 16 * width}}


def script(model, x, path):
    return torch.jit.script(model)


def trace(model, x, path):
    return torch.jit.trace(model, x)


def fx(model, x, path):
    return torch.fx.symbolic_trace(model)


def export(model, x, path):
    return torch.export.export(model, (x,), dynamic_shapes=shapes()).module()


def aot_inductor(model, x, path):
    program = torch.export.export(model, (x,), dynamic_shapes=shapes())
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(path / 'model.pt2'))
    return torch._inductor.aoti_load_package(package)


def onnx_of_trace(model, x, path):
    axes = {0: 'batch', 2: 'height', 3: 'width'}
    torch.onnx.export(model, (x,), path / 'model.onnx', dynamo=False, input_names=['x'], dynamic_axes={'x': axes})
    return load_onnx(path / 'model.onnx')


def onnx_of_export(model, x, path):
    torch.onnx.export(model, (x,), path / 'model.onnx', dynamo=True, verbose=False, dynamic_shapes=shapes())
    return load_onnx(path / 'model.onnx')


def openvino(model, x, path):
    import openvino

    compiled = openvino.compile_model(openvino.convert_model(model, example_input=x), 'CPU')
    return lambda x: [torch.from_numpy(output) for output in compiled(x.numpy()).values()]


WAYS = {  # by row
    '`torch.jit.script`': script,
    '`torch.jit.trace`': trace,
    '`torch.fx.symbolic_trace`': fx,
    '`torch.export`': export,
    'AOTInductor': aot_inductor,
    'ONNX, `dynamo=False`': onnx_of_trace,
    'ONNX, `dynamo=True`': onnx_of_export,
    'OpenVINO, `convert_model`': openvino,
}
LIMITS = {  # with acceleration: the cell, with the number of the note below the table, and what is raised
    '`torch.jit.trace`': ('that size only (1)', 'must match the existing size'),
    '`torch.fx.symbolic_trace`': ('no (2)', 'Proxy'),
    '`torch.export`': ('no (3)', 'exported for images of one size'),
    'AOTInductor': ('no (3)', 'exported for images of one size'),
    'ONNX, `dynamo=False`': ('that size only (1)', 'invalid expand shape'),
    'ONNX, `dynamo=True`': ('that size only (3)', 'Non-zero status code'),
    'OpenVINO, `convert_model`': ('that size only (1)', 'mismatch'),
}
QUICK = {
    *product(['ONNX, `dynamo=False`'], MODELS),
    *product(['`torch.jit.trace`'], ['Fast-iTPN', 'iTPN, HiViT', 'with acceleration']),
    *product(['`torch.export`'], ['iTPN `_fpn`', 'with acceleration']),
    ('`torch.fx.symbolic_trace`', 'with acceleration'),
}


def limit(way, column):
    return LIMITS.get(way) if column == 'with acceleration' else None


def cells():
    """All of the table; not run by default are those that take long, all but one of their kind, and those that others
    contain: ONNX without dynamo traces, AOTInductor exports."""
    for cell in product(WAYS, MODELS):
        yield pytest.param(*cell, marks=[] if cell in QUICK else pytest.mark.slow)


def assert_same(run, model, shape):
    x = images(*shape)
    found, expected = (list(y) if isinstance(y, (list, tuple)) else [y] for y in (run(x), model(x)))
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures('one_thread')
@pytest.mark.filterwarnings('ignore:Constant folding', 'ignore:# .axis name')  # of the exporters
@pytest.mark.parametrize('way, column', list(cells()))
def test_images_of_any_size(way, column, tmp_path):
    if WAYS[way] is openvino and importlib.util.find_spec('openvino') is None:
        pytest.skip('openvino is not installed')
    kwargs = {'depths': (1, 1, 1), **MODELS[column], 'scriptable' if WAYS[way] is script else 'exportable': True}
    model = small_model(
        **kwargs, img_size=BUILT_FOR, dynamic_img_size=True, embed_dim=64, head_init_scale=1.)
    cell, message = limit(way, column) or ('works', None)
    with torch.no_grad():
        if cell.startswith('no'):
            with pytest.raises(Exception, match=message):
                WAYS[way](model, images(*EXAMPLE), tmp_path)
            return
        run = WAYS[way](model, images(*EXAMPLE), tmp_path)
        assert_same(run, model, EXAMPLE)
        for size in OTHER_SIZES:
            if message is None:
                assert_same(run, model, size)
            else:  # and is never wrong
                with pytest.raises(Exception, match=message):
                    run(images(*size))


def test_page_has_the_table():
    rows = [[way, *((limit(way, column) or ['works'])[0] for column in MODELS)] for way in WAYS]
    assert table(['images of any size', *MODELS], rows) in PAGE.read_text()
