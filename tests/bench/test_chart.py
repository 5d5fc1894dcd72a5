"""The chart: a panel per case, a bar per contestant, and the ceiling where it belongs."""
import sys
from pathlib import Path

import pytest
from PIL import Image

from timm_itpn.bench.cases import Case
from timm_itpn.bench.chart import check_output, draw, save


def row(contestant, ms_per_image, size=224):
    return {
        **Case(size=size)._asdict(), 'contestant': contestant, 'ms_per_image': ms_per_image, 'gflop_per_image': 38.,
        'ceiling_tflop_per_s': 0.19, 'machine': 'A CPU', 'gpu': None, 'threads': 2, 'cores': 2, 'python': '3',
        'torch': '2', 'timm': '1', 'timm_itpn': '0', 'date': '2026-01-02'}


ROWS = [row('ours', 240.), row('baseline', 250.), row('ours', 1500., 512), row('baseline', 2000., 512)]


def test_bars_and_ceiling_are_where_they_belong():
    first, second = draw(ROWS).axes
    assert [bar.get_width() for bar in first.patches] == [240, 250]
    assert [bar.get_width() for bar in second.patches] == [1500, 2000]
    assert [label.get_text() for label in first.get_yticklabels()] == ['ours', 'baseline']
    assert [list(axes.lines[0].get_xdata()) for axes in (first, second)] == [[200, 200], [200, 200]]
    assert '224 px' in first.get_title() and '512 px' in second.get_title()


def test_whatever_is_made_of_ours_has_its_colour():
    names = ('ours', 'ours fused', 'ours full fused', 'baseline', 'ours.py:build')
    axes, = draw([row(name, 240., '64x96') for name in names]).axes
    colours = [bar.get_facecolor() for bar in axes.patches]
    assert colours[0] == colours[1] == colours[2] != colours[3] == colours[4]
    assert '64x96 px' in axes.get_title()


def test_cost_is_drawn_over_tokens_where_only_the_size_differs():
    rows = ROWS + [row('ours', 700., '320x512'), row('baseline', 900., '320x512')]
    *_, flops, times = draw(rows).axes
    assert times.get_ylabel() == 'ms per image' and flops.get_ylabel() == 'GFLOP per image'
    ours, baseline = times.lines
    assert list(ours.get_xdata()) == [196, 640, 1024] and list(ours.get_ydata()) == [240, 700, 1500]
    assert list(baseline.get_ydata()) == [250, 900, 2000]
    assert len(draw([*ROWS, {**row('ours', 1., 96), 'batch': 1}]).axes) == 3


@pytest.mark.parametrize('num_rows', [1, 4])
def test_png_is_written_whole(num_rows, tmp_path):
    save(draw(ROWS[:num_rows]), tmp_path / 'chart.png')
    with Image.open(tmp_path / 'chart.png') as image:
        assert image.format == 'PNG' and image.width > 300
    assert [path.name for path in tmp_path.iterdir()] == ['chart.png']


@pytest.mark.parametrize('name, message', [('chart.jpg', 'no name of a PNG file'), ('nope/chart.png', 'no folder')])
def test_output_is_checked_beforehand(name, message, tmp_path):
    check_output(tmp_path / 'chart.PNG')
    with pytest.raises(ValueError, match=message):
        check_output(tmp_path / name)


def test_matplotlib_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(RuntimeError, match=r"^--plot needs matplotlib: pip install 'timm-itpn\[demo\]'$"):
        check_output(Path('chart.png'))
