"""Figures: what they draw is what the grid holds, and a stranger can read them at README width."""

from __future__ import annotations

from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.patches import Patch

from cosprobe.evaluation.grid import Grid
from cosprobe.evaluation.scoring import build_grid
from cosprobe.evaluation.variables import X0_PARSED
from cosprobe.reporting.figures import (
    BASELINE_STYLE,
    LAYER_LABEL,
    OUTLINE,
    QUESTIONS,
    STEP_LABEL,
    UNDEFINED,
    WORST,
    _border,
    curves,
    default_layers,
    frame_maps,
    headline,
    maps,
    skill_colours,
    ticks,
)
from tests.examples.figures import apart, check_words
from tests.examples.grids import ANSWER, CONTROL, DOORS, MODEL_ANSWER, START, synthetic


@pytest.fixture(scope="module")
def grid() -> Grid:
    return build_grid(synthetic(steps=12, targets=(ANSWER, MODEL_ANSWER, START, DOORS, CONTROL)), draws=200)


@pytest.fixture(scope="module")
def framed() -> Grid:
    positions, branches = ("all", "0", "1", "2"), ("cond", "uncond")
    return build_grid(synthetic(4, 5, 80, positions, branches, targets=(ANSWER, MODEL_ANSWER)), draws=100)


def panels(figure):
    return [axes for axes in figure.axes if axes.get_visible() and axes.get_xlabel()]


def texts(figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_map_shows_the_skill_of_every_cell(grid):
    first, second = panels(headline(grid))
    for axes, target in ((first, "answer"), (second, "model_answer")):
        (mesh,) = [c for c in axes.collections if type(c) is QuadMesh]
        drawn = np.ma.filled(mesh.get_array(), np.nan).reshape(8, 12)
        np.testing.assert_array_equal(drawn, grid.plane(target).skill.transpose("layer", "step").values)
        assert mesh.get_clim() == (WORST, 1)
        assert axes.get_ylim()[0] < axes.get_ylim()[1]  # layer 0 at the bottom
        assert (axes.get_xlabel(), axes.get_ylabel()) == (STEP_LABEL, LAYER_LABEL)


def test_an_answer_that_is_no_region_is_no_candidate():
    colour = replace(ANSWER, name="colour", form="problem")
    title = panels(headline(build_grid(synthetic(4, 4, 80, targets=(colour,)), draws=50)))[0].get_title(loc="left")
    assert "answer" in title and "candidate" not in title


def test_title_says_what_is_decoded_from_how_many_of_what(grid):
    answer, model_answer = (axes.get_title(loc="left") for axes in panels(headline(grid)))
    assert QUESTIONS["answer"] in answer
    assert "kind one-exit, n = 196" in answer
    assert f"best accuracy {grid.best('answer').accuracy:.2f}" in answer
    assert QUESTIONS["model_answer"] in model_answer
    (control,) = (axes.get_title(loc="left") for axes in panels(maps(grid, ["control"])))
    assert QUESTIONS["control"] in control
    assert "all problems" in control
    assert "no evidence" in control


def test_star_stands_on_the_best_cell_and_only_where_there_is_evidence(grid):
    for target in ("answer", "control"):
        (axes,) = panels(maps(grid, [target]))
        stars = [line.get_xydata().tolist() for line in axes.lines if line.get_marker() == "*"]
        cell = grid.best(target).cell
        assert stars == ([[[cell.step + 0.5, cell.layer + 0.5]]] if target == "answer" else [])


def test_hatched_cells_are_those_without_evidence(grid):
    for target in ("model_answer", "control"):
        (axes,) = panels(maps(grid, [target]))
        (hatched,) = [c for c in axes.collections if c.get_hatch()]
        assert hatched.get_array().count() == int((grid.plane(target).p_evidence > 0.05).sum())


def test_cells_without_any_p_are_hatched_too():
    evaluated = synthetic(2, 3, 40, targets=(ANSWER,))
    first = evaluated.results[0]
    few = replace(first, test=replace(first.test, keys=np.array([f"t{i % 11}" for i in range(40)])))
    (axes,) = panels(maps(build_grid(replace(evaluated, results=(few,)), draws=20), ["answer"]))
    (hatched,) = [c for c in axes.collections if c.get_hatch()]
    assert hatched.get_array().count() == 6
    (outline,) = [c for c in axes.collections if isinstance(c, LineCollection)]
    assert len(outline.get_segments()) == 0


@pytest.mark.slow
def test_outline_holds_the_cells_that_read_more_than_the_picture_shows(grid):
    plane = grid.plane("answer").transpose("layer", "step", ...)
    inside = ((plane.p_x0 <= 0.05) & (plane.p_evidence <= 0.05)).values
    assert 0 < inside.sum() < inside.size
    (axes,) = panels(maps(grid, ["answer"]))
    (outline,) = [c for c in axes.collections if isinstance(c, LineCollection)]
    segments = {tuple(map(tuple, s.astype(int).tolist())) for s in outline.get_segments()}
    for row, column in np.ndindex(inside.shape):
        for dy, dx, edge in (
            (1, 0, ((column, row + 1), (column + 1, row + 1))),
            (0, 1, ((column + 1, row), (column + 1, row + 1))),
        ):
            y, x = row + dy, column + dx
            neighbour = inside[y, x] if y < inside.shape[0] and x < inside.shape[1] else False
            assert (edge in segments) == (inside[row, column] != neighbour)


def test_border_of_one_cell_is_its_four_sides():
    assert len(_border(np.array([[False, False], [False, True]]))) == 4
    assert len(_border(np.array([[True, True], [True, True]]))) == 8
    assert _border(np.zeros((3, 3), dtype=bool)) == []


def test_legend_explains_only_what_occurs(grid):
    hatch, star, grey = "hatched: no evidence", "star: the best cell", "grey: no skill"

    def explained(shown: Grid, target: str) -> set[str]:
        (legend,) = maps(shown, [target]).legends
        assert all(text.get_text() for text in legend.get_texts())
        found = set()
        for mark in legend.legend_handles:
            if isinstance(mark, Patch):
                found.add(hatch if mark.get_hatch() else grey)
            else:
                found.add(star if mark.get_marker() == "*" else "outline")
        return found

    assert hatch in explained(grid, "control") and star not in explained(grid, "control")
    assert star in explained(grid, "start") and not {hatch, grey} & explained(grid, "start")
    blank = grid.dataset.copy(deep=True)
    blank.skill.loc[{"target": "start", "step": 3}] = np.nan
    assert grey in explained(Grid(blank), "start")


def test_lightness_falls_on_either_side_of_zero():
    """The map reads the same printed in grey."""
    colours = skill_colours()
    rgb = colours(np.linspace(0, 1, 300))[:, :3]
    light = rgb @ [0.2126, 0.7152, 0.0722]
    zero = round(-WORST / (1 - WORST) * 299)
    assert light[zero] > 0.98
    assert (np.diff(light[zero:]) <= 1e-3).all()
    assert (np.diff(light[: zero + 1]) >= -1e-3).all()
    assert matplotlib.colors.to_hex(colours(np.nan)) == UNDEFINED


def test_curves_are_the_accuracies_and_parsed_answers_only_where_decoded(grid):
    figure = curves(grid, ["answer", "model_answer"], layers=[0, 7])
    for axes, target in zip(panels(figure), ("answer", "model_answer"), strict=True):
        lines = {line.get_label(): line for line in axes.lines}
        plane = grid.plane(target)
        for layer in (0, 7):
            np.testing.assert_array_equal(lines[f"probe on layer {layer}"].get_ydata(), plane.accuracy.sel(layer=layer))
        parsed = lines[BASELINE_STYLE[X0_PARSED][0]]
        np.testing.assert_array_equal(
            parsed.get_ydata(), plane.baseline_accuracy.sel(baseline=X0_PARSED).dropna("step")
        )
        assert parsed.get_xdata().tolist() == [0, 2, 5, 8, 11]
        assert len(axes.collections) == 2  # an interval band per layer
        others = lines.keys() - {label for label, _ in BASELINE_STYLE.values()}  # one may be the best input throughout
        assert sum(np.array_equal(lines[name].get_ydata(), plane.reference) for name in others) == 1
        assert set(lines["chance"].get_ydata()) == {float(plane.chance)}
        own = [line for line in axes.lines if set(line.get_ydata()) == {grid.dataset.attrs["model_accuracy"]}]
        assert len(own) == (target == "answer")
        assert axes.get_xlabel() == STEP_LABEL
    assert len(texts(figure)) == len(set(texts(figure))) == 2 + 6 + 1


def test_default_layers_spread_and_hold_the_best(grid):
    chosen = default_layers(grid, ["answer", "model_answer"])
    assert {0, 7, grid.best("answer").cell.layer, grid.best("model_answer").cell.layer} <= set(chosen)
    assert len(chosen) <= 6


def test_frame_maps_cross_at_the_best_cell(framed):
    left, right = panels(frame_maps(framed, "answer"))
    cell = framed.best("answer").cell
    data = framed.dataset.sel(target="answer", branch=cell.branch)
    meshes = [next(c for c in axes.collections if type(c) is QuadMesh).get_array() for axes in (left, right)]
    np.testing.assert_array_equal(meshes[0].data, data.skill.sel(step=cell.step).transpose("layer", "position"))
    np.testing.assert_array_equal(meshes[1].data, data.skill.sel(layer=cell.layer).transpose("position", "step"))
    assert [tick.get_text() for tick in left.get_xticklabels()] == ["all", "0", "1", "2"]
    assert "latent frame" in left.get_xlabel()
    assert "latent frame" in right.get_ylabel()


def test_frame_maps_need_several_positions(grid):
    with pytest.raises(ValueError, match="position.*'all'.*probe=frames"):
        frame_maps(grid, "answer")


def test_a_change_of_expert_is_marked():
    evaluated = synthetic(2, 4, 40, targets=(ANSWER,))
    object.__setattr__(evaluated, "experts", ("high", "high", "low", "low"))
    (axes,) = panels(maps(build_grid(evaluated, draws=20), ["answer"]))
    assert [text.get_text() for text in axes.texts] == ["high", "low"]
    assert any(line.get_xdata()[0] == 2 for line in axes.lines if len(line.get_xdata()) == 2)


def test_outline_colour_is_not_on_the_map():
    rgb = np.array(matplotlib.colors.to_rgb(OUTLINE))
    assert np.abs(skill_colours()(np.linspace(0, 1, 300))[:, :3] - rgb).sum(1).min() > 0.25


@pytest.mark.slow
@pytest.mark.parametrize("draw", ["headline", "others", "curves", "frames", "one"])
def test_every_word_is_legible_and_inside_the_picture(grid, framed, draw):
    """At 100 px per inch: at least 10 px high, cut off nowhere, no title running into the next panel."""
    figure = {
        "headline": lambda: headline(grid),
        "others": lambda: maps(grid, ["start", "corridors", "control"]),
        "curves": lambda: curves(grid, ["answer", "model_answer"]),
        "frames": lambda: frame_maps(framed, "model_answer"),
        "one": lambda: maps(framed, ["answer"]),
    }[draw]()
    drawn = check_words(figure)
    assert apart([box for t, box in drawn.items() if "\n" in t.get_text() and "problems" in t.get_text()])  # titles


def scale(figure) -> str:
    return next(axes.get_ylabel() for axes in figure.axes if "skill" in axes.get_ylabel())


def test_the_scale_says_what_a_target_has_to_beat(grid, framed):
    assert "as the best input\nor chance" in scale(maps(grid, ["answer", "start"]))
    assert "best input" in scale(frame_maps(framed, "answer"))
    alone = maps(grid, ["start", "control"])
    assert "best input" not in scale(alone) and "as accurate as chance" in scale(alone)
    assert all("vs chance" in axes.get_title("left") for axes in panels(alone))
    assert "vs chance" not in panels(maps(grid, ["answer"]))[0].get_title("left")


def test_a_target_without_baselines_has_no_colour_and_names_them():
    evaluated = synthetic(2, 3, 40, targets=(ANSWER,))
    bare = replace(evaluated, results=(replace(evaluated.results[0], readings={}),))
    built = build_grid(bare, draws=20)
    assert np.isnan(built.dataset.skill).all() and np.isnan(built.dataset.reference).all()
    assert np.isnan(built.dataset.p_evidence).all() and np.isfinite(built.dataset.p_permutation).all()
    figure = maps(built, ["answer"])
    assert "baselines: noise, first_frame, prompt, embed, x_t" in panels(figure)[0].get_title("left")
    check_words(figure)
    some = replace(bare.results[0], readings={"embed": evaluated.results[0].readings["embed"]})
    part = build_grid(replace(bare, results=(some,)), draws=20).dataset
    assert part.not_measured.values.tolist() == ["noise,first_frame,prompt,x_t"] and np.isfinite(part.skill).any()


def test_ticks_are_few_and_round():
    assert ticks(np.arange(8)) == list(range(8))
    assert ticks(np.arange(20)) == [0, 5, 10, 15]
    assert ticks(np.array([0, 10, 20])) == [0, 10, 20]
    assert all(len(ticks(np.arange(n))) <= 8 for n in range(1, 300))
