"Figures: sizes of thumbnails and fonts, full colour, one scale for heat maps, references and error bars."

from io import BytesIO

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from PIL import Image

from mimstudy.core.plotting import (
    DPI,
    MAX_COLUMNS,
    PAGE_DPI,
    cover_hidden,
    show_bars,
    show_curves,
    show_heatmaps,
    show_images,
    show_labels,
    show_masked,
)

NAMES = ['original', 'second\nrow']


def images(n):
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def heat(rows, columns):
    return torch.rand(rows, columns, 8, 8, generator=torch.Generator().manual_seed(0))


def thumbnails(figure):
    "Widths in pixels, as a notebook shows them, of the panels with images."
    figure.png()
    panels = [panel for panel in figure.axes if panel.get_images()]
    return [panel.get_window_extent().width * DPI / figure.dpi for panel in panels]


FIGURES = {
    'images': lambda: show_images(images(14), titles=['ball'] * 14, columns=MAX_COLUMNS, rows=NAMES),
    'too many columns': lambda: show_images(images(20), columns=20),
    'masked': lambda: show_masked(images(7), torch.rand(7, 16) < 0.6, 8, columns=7),
    'labels': lambda: show_labels(torch.randint(0, 5, (7, 32, 32)), list('abcde'), columns=7),
    'heatmaps': lambda: show_heatmaps(images(7), heat(2, 7), rows=NAMES, titles=['query'] * 7),
    'curves': lambda: show_curves({'a': [3, 2, 1], 'b': [1, 1, 1]}, 'step', 'loss', references={'mean': 2}),
    'bars': lambda: show_bars({'a': {'trained': (48.2, 1.6)}}, 'top-1, %', references={'chance': 8.3}),
}


@pytest.mark.parametrize('name', ['images', 'too many columns', 'masked', 'labels', 'heatmaps'])
def test_thumbnails_have_at_least_120_pixels(name):
    assert min(thumbnails(FIGURES[name]())) >= 120


@pytest.mark.parametrize('name', FIGURES)
def test_no_text_is_smaller_than_8_points(name):
    figure = FIGURES[name]()
    figure.png()
    sizes = [text.get_fontsize() for text in figure.findobj(Text) if text.get_text()]
    assert min(sizes, default=8) >= 8


def test_png_has_full_colour_and_its_resolution():
    figure = show_images(images(6))
    small, large = (Image.open(BytesIO(figure.png(dpi))) for dpi in (DPI, PAGE_DPI))
    assert small.mode == 'RGB'
    assert len(small.getcolors(small.width * small.height)) > 256
    assert large.width == pytest.approx(small.width * PAGE_DPI / DPI, abs=2)


def test_rows_and_columns_are_labelled():
    figure = show_images(images(4), titles=list('abcd'), columns=2, rows=NAMES)
    assert [panel.get_title() for panel in figure.axes] == list('abcd')
    assert [panel.get_ylabel() for panel in figure.axes] == ['original', '', 'second\nrow', '']


def test_hidden_patches_are_covered_and_visible_ones_unchanged():
    x = images(1)
    hidden = torch.zeros(1, 16, dtype=torch.bool)
    hidden[0, 1] = True
    covered = cover_hidden(x, hidden, 8)
    assert (covered[0, :, :8, 8:16] == 150 / 255).all()
    covered[0, :, :8, 8:16] = x[0, :, :8, 8:16]
    assert torch.equal(covered, x)


def scales(figure):
    "The range of values of each heat map."
    maps = [panel.get_images()[-1] for panel in figure.axes if len(panel.get_images()) > 1]
    return {(drawn.norm.vmin, drawn.norm.vmax) for drawn in maps}


def test_heatmaps_share_one_scale_which_the_colour_bar_names():
    values = heat(1, 3)
    figure = show_heatmaps(images(3), values, label='attention, %')
    assert scales(figure) == {(0, float(values.max()))}
    assert figure.axes[-1].get_ylabel() == 'attention, %'


def test_heatmaps_relative_to_each_panel_say_so():
    figure = show_heatmaps(images(3), heat(1, 3), label='attention', common=False)
    assert scales(figure) == {(0, 1.0)}
    assert 'relative to the maximum of each panel' in figure.axes[-1].get_ylabel()


def test_whole_numbers_have_whole_ticks():
    panel = show_curves({'loss': np.exp(-np.arange(20) / 8)}, x='step').axes[0]
    assert all(float(tick).is_integer() for tick in panel.get_xticks())


def test_curves_name_their_references_outside_the_data():
    figure = show_curves({'a': [1, 2], 'b': [2, 1]}, references={'random initialisation': 1.5})
    assert not figure.axes[0].get_legend()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ['a', 'b', 'random initialisation']


def test_curves_have_bands_of_the_given_width():
    figure = show_curves({'a': [1.0, 2.0, 3.0]}, bands={'a': 0.5})
    (band,) = figure.axes[0].collections
    height = band.get_paths()[0].vertices[:, 1]
    assert height.min() == pytest.approx(0.5) and height.max() == pytest.approx(3.5)


def test_bars_have_error_bars():
    figure = show_bars({'prefix': {'random': (24.0, 1.5), 'trained': (48.0, 2.0)}})
    panel = figure.axes[0]
    assert [bar.get_height() for bar in panel.patches] == [24.0, 48.0]
    ends = [line.get_segments()[0][:, 1].tolist() for line in panel.collections]
    assert ends == [[22.5, 25.5], [46.0, 50.0]]
