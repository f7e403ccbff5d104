"""Figures are legible where they are printed: across a page, and in one column of two."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.lines import Line2D
from matplotlib.text import Text

from diablo_theory.reporting.figures import all_plans
from diablo_theory.reporting.layout import (
    COLUMN,
    WHOLE,
    drawn_for,
    foot,
    grid,
    label_below,
    label_left,
    legend,
    names_beside,
    spanning,
    styled,
)

SAVED = Path(__file__).resolve().parents[2] / "paper_results"
PAGES = {"page": WHOLE, "column": COLUMN}
TALLEST = 9.2  # inches of a column on letter paper
SLACK = 1.5  # points that boxes of letters may stand over: they hold room above and below the letters


@pytest.fixture(scope="module", params=PAGES)
def drawn(request):
    """All figures of the saved results for a page, each with its words."""
    page = PAGES[request.param]
    with drawn_for(page):
        figures = {stem: plan.draw() for stem, plan in all_plans(SAVED).items() if plan.available}
    return page, {stem: (figure, words(figure)) for stem, figure in figures.items()}


def words(figure):
    """Every text that is seen, with its box in points: left, low, right, high."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    found, beyond = [], ticks_beyond(figure)
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text().strip() and text not in beyond:
            box = text.get_window_extent(renderer)
            found.append((text, 72 / figure.dpi * np.array([box.x0, box.y0, box.x1, box.y1])))
    return found


def ticks_beyond(figure):
    """Labels that matplotlib keeps for ticks beyond their axis, and for those of axes that are off."""
    kept = set()
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
            if not (low <= tick.get_loc() <= high and axis.axes.axison and axis.get_visible()):
                kept |= {tick.label1, tick.label2}
    return kept


def test_every_figure_has_the_width_of_its_page_and_fits_it(drawn):
    page, figures = drawn
    assert len(figures) >= 15
    for stem, (figure, _) in figures.items():
        assert figure.get_figwidth() == page.width, stem
        assert figure.get_figheight() <= TALLEST, stem


def test_letters_are_large_enough_and_none_is_cut_off(drawn):
    page, figures = drawn
    for stem, (figure, said) in figures.items():
        for text, (left, low, right, high) in said:
            assert text.get_fontsize() >= page.small, (stem, text)
            assert min(left, low) >= -SLACK, (stem, text)
            assert right <= 72 * page.width + SLACK, (stem, text)
            assert high <= 72 * figure.get_figheight() + SLACK, (stem, text)


def test_no_words_cover_each_other(drawn):
    _, figures = drawn
    for stem, (_, said) in figures.items():
        for (one, a), (two, b) in combinations(said, 2):
            over = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
            assert over.min() <= SLACK, (stem, one, two)


@styled
def two_panels():
    figure, panels = grid([1.0, 1.0], 2, 0.5, sharex="col", sharey="row")
    for place, axes in enumerate(panels.ravel()):
        axes.plot([0, place + 1], [0, 10 ** (place // 2)])
    panels[0, 0].set_title("A title of a panel that is too long by far for one column of two")
    label_below(panels, "first", "second " * 20)
    label_left(panels, "up")
    legend(figure, [Line2D([], [], label=f"the {number}th of the methods") for number in range(3)], 3)
    foot(figure, "One sentence.", "", "Another sentence. " * 8)
    return figure


def test_panels_stand_side_by_side_on_a_page_and_below_each_other_in_a_column():
    page = two_panels()
    with drawn_for(COLUMN):
        column = two_panels()
    assert {axes.get_subplotspec().get_gridspec().ncols for axes in page.axes} == {2}
    assert {axes.get_subplotspec().get_gridspec().ncols for axes in column.axes} == {1}
    # What a panel on the left says for its neighbours, each says itself where there are none.
    assert [axes.get_ylabel() for axes in page.axes] == ["up", "", "up", ""]
    assert [axes.get_ylabel() for axes in column.axes] == ["up"] * 4
    assert [axes.get_xlabel()[:5] for axes in page.axes] == ["", "", "first", "secon"]
    assert [axes.get_xlabel()[:5] for axes in column.axes] == ["first", "secon"] * 2


def test_names_stand_at_the_left_panel_or_at_each():
    def names():
        figure, panels = grid([1.0], 2)
        for axes in panels[0]:
            axes.set_yticks([0.0], ["a name"])
            names_beside(axes)
        return [[label.get_text() for label in axes.get_yticklabels()] for axes in figure.axes]

    assert names() == [["a name"], [""]]
    with drawn_for(COLUMN):
        assert names() == [["a name"], ["a name"]]


def test_panels_share_their_axes_wherever_they_lie():
    page = two_panels()
    with drawn_for(COLUMN):
        column = two_panels()
    for figure in (page, column):
        limits = [(axes.get_xlim(), axes.get_ylim()) for axes in figure.axes]
        assert limits[0][0] == limits[2][0] != limits[1][0] == limits[3][0]
        assert limits[0][1] == limits[1][1] != limits[2][1] == limits[3][1]


def test_long_titles_labels_and_notes_are_broken_and_the_figure_grows_for_them():
    page = two_panels()
    with drawn_for(COLUMN):
        column = two_panels()
    assert "\n" not in page.axes[0].get_title(loc="left")
    assert "\n" in column.axes[0].get_title(loc="left")
    assert "\n" in column.axes[1].get_xlabel()
    assert column.get_supxlabel().count("\n") > page.get_supxlabel().count("\n")
    assert " ".join(column.get_supxlabel().split()) == " ".join(page.get_supxlabel().split())
    assert column.get_figheight() > 4.5


def test_rows_may_have_different_numbers_of_panels():
    figure, rows = spanning([1.0, 2.0], (1, 2))
    assert [len(row) for row in rows] == [1, 2]
    assert list(rows[0][0].get_subplotspec().colspan) == [0, 1]
    with drawn_for(COLUMN):
        figure, rows = spanning([1.0, 2.0], (1, 2))
    assert [len(row) for row in rows] == [1, 2]
    assert [axes.get_subplotspec().rowspan.start for axes in figure.axes] == [0, 1, 2]


def test_after_an_error_figures_are_for_a_page_again():
    with pytest.raises(ZeroDivisionError), drawn_for(COLUMN):
        raise ZeroDivisionError
    assert two_panels().get_figwidth() == WHOLE.width
