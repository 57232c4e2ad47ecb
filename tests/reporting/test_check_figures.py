"""Pictures of the checks: what they draw is what the checks hold, and a stranger can read them at README width."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.collections import PolyCollection, QuadMesh
from matplotlib.colors import to_hex

from cosprobe.evaluation.checks.generalisation import Matrix
from cosprobe.evaluation.checks.untrained import WEIGHTS
from cosprobe.evaluation.grid import Grid
from cosprobe.reporting.check_figures import check_panels, generalisation
from tests.examples.figures import apart, check_words
from tests.examples.runs import Run, run, small

pytestmark = pytest.mark.slow  # what all of them read takes seconds to make


@pytest.fixture(scope="module")
def made() -> Run:
    return run()


def panels(figure, across: int):
    shown = [axes for axes in figure.axes if axes.get_visible() and axes.get_xlabel()]
    return np.array(shown, dtype=object).reshape(-1, across)


def lines(axes) -> dict[str, np.ndarray]:
    """Points [point, (x, y)] of every named line."""
    return {line.get_label(): line.get_xydata() for line in axes.lines}


def words(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_a_heat_map_per_matrix_with_rows_trained_on_and_columns_read_on(made):
    found = made.checks.matrices
    shown = panels(generalisation(made.grid, found), 1).ravel()
    assert len(shown) == len(found) == 10
    for axes, matrix in zip(shown, found, strict=True):
        (mesh,) = [c for c in axes.collections if type(c) is QuadMesh]
        drawn = np.ma.filled(mesh.get_array(), np.nan).reshape(matrix.accuracy.shape)
        np.testing.assert_array_equal(drawn, matrix.accuracy)
        assert mesh.get_clim() == (float(made.grid.plane(matrix.target).chance), 1)
        assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first row stands on top, as in a table
        assert axes.get_title(loc="left") == f"{matrix.accuracy.min():.2f} to {matrix.accuracy.max():.2f}"
        assert axes.get_xlabel() == f"tested on {matrix.axis}"
        assert axes.get_ylabel() == f"trained on {matrix.axis}"
        assert [t.get_text() for t in axes.get_xticklabels()] == list(matrix.test)
        assert [t.get_text() for t in axes.get_yticklabels()] == list(matrix.train)
        assert words(axes) == [f"{value:.2f}" for value in matrix.accuracy.ravel()]


def test_numbers_stand_in_their_squares_and_only_where_there_are_few(made):
    names = ("a", "b")
    values = np.array([[0.9, 0.1], [0.4, 0.7]])
    small_one = Matrix("answer", "seed", names, names, values, values, values, np.ones(2, int), np.ones(2, int))
    many = tuple(map(str, range(20)))
    wide = np.full((20, 20), 0.5)
    large = Matrix("answer", "step", many, many, wide, wide, wide, np.ones(20, int), np.ones(20, int))
    first, second = panels(generalisation(made.grid, [small_one, large]), 1).ravel()
    assert {t.get_text(): t.get_position() for t in first.texts} == {
        "0.90": (0.5, 0.5), "0.10": (1.5, 0.5), "0.40": (0.5, 1.5), "0.70": (1.5, 1.5),
    }  # fmt: skip
    assert [to_hex(t.get_color()) for t in first.texts] == ["#ffffff", "#000000", "#000000", "#ffffff"]
    assert words(second) == []
    assert [t.get_text() for t in second.get_xticklabels()] == ["0", "5", "10", "15"]


def test_learning_curves_are_those_of_the_description_lengths(made):
    shown = panels(check_panels(made.grid, made.checks), 4)
    assert len(shown) == 2
    for row, length in zip(shown, made.checks.lengths, strict=True):
        drawn = lines(row[0])
        assert list(drawn) == ["probe", "input of block 0", "latent of x0-hat"]
        for curve, value in zip(drawn.values(), length.accuracy.value, strict=True):
            np.testing.assert_array_equal(curve, np.stack([length.sizes, value], axis=1))
        (band,) = [c for c in row[0].collections if isinstance(c, PolyCollection)]
        corners = band.get_paths()[0].vertices
        for size, low, high in zip(length.sizes, length.accuracy.lower[0], length.accuracy.upper[0], strict=True):
            at = corners[corners[:, 0] == size, 1]
            assert (at.min(), at.max()) == (low, high)
        assert [t.get_text() for t in row[0].get_xticklabels()] == ["12", "24", "48"]


def test_reliability_with_and_without_the_temperature(made):
    for row, curves in zip(
        panels(check_panels(made.grid, made.checks), 4), made.checks.reliability.values(), strict=True
    ):
        drawn = lines(row[1])
        for name, curve in zip(("with temperature", "without"), curves, strict=True):
            np.testing.assert_array_equal(drawn[name], np.stack([curve.confidence, curve.accuracy], axis=1))
        np.testing.assert_array_equal(drawn["equal"], [[0, 0], [1, 1]])


def test_weights_are_drawn_by_layer_at_the_first_step(made):
    table = made.weights
    for t, row in enumerate(panels(check_panels(made.grid, made.checks), 4)):
        drawn = row[2].containers
        assert [container.get_label() for container in drawn] == [f"{how} weights" for how in WEIGHTS]
        for w, (line, _, (bars,)) in enumerate(container.lines for container in drawn):
            np.testing.assert_allclose(line.get_xdata(), np.arange(3) + 0.2 * (w - 1))
            np.testing.assert_array_equal(line.get_ydata(), table.accuracy[t, w, :3])
            ends = np.array([segment[:, 1] for segment in bars.get_segments()])
            np.testing.assert_allclose(ends, np.stack([table.lower[t, w, :3], table.upper[t, w, :3]], axis=1))
        assert row[2].get_xlabel() == "layer (at step 0)"
        assert [tick.get_text() for tick in row[2].get_xticklabels()] == ["0", "1", "2"]


def test_latency_by_layer_with_the_picture_beside_it(made):
    for row, name in zip(panels(check_panels(made.grid, made.checks), 4), made.checks.best, strict=True):
        plane = made.grid.plane(name)
        known = np.isfinite(plane.latency.values)
        assert 0 < known.sum() < 3  # layer 0 holds nothing
        (container,) = row[3].containers
        line, _, (bars,) = container.lines
        np.testing.assert_array_equal(
            line.get_xydata(), np.stack([plane.layer.values[known], plane.latency.values[known]], axis=1)
        )
        ends = np.array([segment[:, 1] for segment in bars.get_segments()])
        np.testing.assert_allclose(ends[:, 0], plane.latency_lower.values[known])
        np.testing.assert_allclose(ends[:, 1], plane.latency_upper.values[known])
        assert set(lines(row[3])["x0-hat"][:, 1]) == {float(plane.x0_latency)}
        assert [tick.get_text() for tick in row[3].get_xticklabels()] == ["0", "1", "2"]


def test_every_panel_says_what_is_read_from_it_and_every_column_has_one_legend(made):
    figure = check_panels(made.grid, made.checks)
    shown = panels(figure, 4)
    for row in shown:
        assert all(axes.get_title("left") and axes.get_xlabel() and axes.get_ylabel() for axes in row)
        assert len({axes.get_title("left") for axes in row}) == 4
        assert not any(axes.get_legend() for axes in row)  # none over the data
    assert len(figure.subfigs[-1].legends) == 4
    for part, (name, cell) in zip(figure.subfigs, made.checks.best.items(), strict=False):
        said = part.get_suptitle().replace("\\", "")
        assert name in said and f"layer {cell.layer}, step {cell.step}" in said


def test_what_is_missing_says_so(made):
    few = small()
    for row in panels(check_panels(few.grid, few.checks), 4):
        assert words(row[0]) == words(row[2]) == ["too few samples"]
        assert words(row[1]) == []
    blind = made.grid.dataset.copy(deep=True)
    blind.latency.loc[{"target": "answer"}] = np.nan
    blind.x0_latency.loc[{"target": "model_answer"}] = np.nan
    none, alone = panels(check_panels(Grid(blind), made.checks), 4)[:, 3]
    assert len(words(none)) == 1
    assert "x0-hat" not in lines(alone)
    other = replace(made.checks, weights=replace(made.weights, targets=("answer", "other")))
    assert words(panels(check_panels(made.grid, other), 4)[1, 2]) == ["too few samples"]


@pytest.mark.parametrize("draw", ["generalisation", "one matrix", "checks", "checks of a small run"])
def test_every_word_is_legible_and_inside_the_picture(made, draw):
    few = small()
    figure = {
        "generalisation": lambda: generalisation(made.grid, made.checks.matrices),
        "one matrix": lambda: generalisation(made.grid, made.checks.matrices[:1]),
        "checks": lambda: check_panels(made.grid, made.checks),
        "checks of a small run": lambda: check_panels(few.grid, few.checks),
    }[draw]()
    drawn = check_words(figure)
    titles = {axes.get_title(loc="left") for axes in figure.axes} - {""}
    labels = {axes.get_xlabel() for axes in figure.axes} | {axes.get_ylabel() for axes in figure.axes}
    assert apart([box for text, box in drawn.items() if text.get_text() in titles | (labels - {""})])
