"Diagrams: arrows end at the borders of boxes, and attention masks show the groups that attend to each other."

import numpy as np
import pytest
from matplotlib.text import Text

from mimstudy.core.diagrams import Diagram, show_attention_mask


def arrow_ends(diagram):
    arrow = next(text for text in diagram.panel.texts if getattr(text, 'arrow_patch', None))
    return arrow.xyann, arrow.xy


@pytest.mark.parametrize(
    'at,tail,head',
    [
        ((6, 1), (1.75, 1), (5.25, 1)),
        ((1, 5), (1, 1.35), (1, 4.65)),
    ],
)
def test_an_arrow_joins_the_sides_that_face_each_other(at, tail, head):
    diagram = Diagram(8, 6).box('a', (1, 1)).box('b', at).arrow('a', 'b')
    ends = arrow_ends(diagram)
    assert ends[0] == pytest.approx(tail) and ends[1] == pytest.approx(head)
    back = Diagram(8, 6).box('a', (1, 1)).box('b', at).arrow('b', 'a')
    assert arrow_ends(back)[0] == pytest.approx(head)


def test_text_of_a_diagram_is_readable():
    diagram = Diagram(8, 2).box('a', (1, 1)).box('b', (6, 1), 'encoder').arrow('a', 'b', 'patches')
    diagram.text((4, 1.8), 'title')
    texts = [text for text in diagram.figure.findobj(Text) if text.get_text()]
    assert {text.get_text() for text in texts} >= {'a', 'encoder', 'patches', 'title'}
    assert min(text.get_fontsize() for text in texts) >= 8


def test_attention_mask_of_semanticmim():
    allowed = [('P', 'P'), ('P', 'V'), ('V', 'P'), ('V', 'V'), ('M', 'P'), ('M', 'M')]
    figure = show_attention_mask({'P': 2, 'V': 3, 'M': 4}, allowed)
    panel = figure.axes[0]
    shown = np.asarray(panel.get_images()[0].get_array())
    expected = np.ones((9, 9))
    expected[:5, 5:] = 0  # proxies and visible patches do not attend to mask tokens
    expected[5:, 2:5] = 0  # mask tokens do not attend to visible patches
    assert (shown == expected).all()
    assert [tick.get_text() for tick in panel.get_xticklabels()] == ['P', 'V', 'M']
    assert panel.get_xlabel() and panel.get_ylabel()
