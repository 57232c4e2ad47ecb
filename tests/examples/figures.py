"""What every figure must be: words large enough to read, inside the picture."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

SMALLEST = 7.2  # points: 10 px high in a README, at 100 px an inch


def check_words(figure: Figure) -> dict[Text, Bbox]:
    """Fails for a word below SMALLEST points or cut off at the rim of the figure, at README width;
    returns the words that are drawn with where they stand."""
    figure.set_dpi(100)
    figure.canvas.draw()
    assert figure.get_figwidth() <= 8
    renderer = figure.canvas.get_renderer()
    width, height = figure.canvas.get_width_height()
    hidden = {t for axes in figure.axes if not axes.get_visible() for t in axes.findobj(Text)}
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())  # ticks beyond the limits exist but are not drawn
        hidden |= {tick.label1 for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high}
    drawn = {}
    for text in figure.findobj(Text):
        if text in hidden or not text.get_text() or not text.get_visible():
            continue
        box = text.get_window_extent(renderer)
        assert text.get_fontsize() >= SMALLEST, text.get_text()
        assert box.x0 >= -1, text.get_text()
        assert box.x1 <= width + 1, text.get_text()
        assert box.y0 >= -1, text.get_text()
        assert box.y1 <= height + 1, text.get_text()
        drawn[text] = box
    return drawn


def apart(boxes: list[Bbox]) -> bool:
    return not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
