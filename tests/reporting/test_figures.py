"""Figures: what they draw is what the grid holds, and a stranger can read them at README width."""

from __future__ import annotations

from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.colors import to_hex

from cosprobe.evaluation.grid import Grid
from cosprobe.evaluation.scoring import build_grid
from cosprobe.evaluation.variables import CEILING, X0_PARSED
from cosprobe.reporting.figures import (
    BASELINE_STYLE,
    LAYER_LABEL,
    QUESTIONS,
    SHOWN,
    STEP_LABEL,
    UNDEFINED,
    border,
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


def drawn(axes) -> np.ndarray:
    """Skill in the squares of a map, NaN for a square without colour."""
    (mesh,) = [c for c in axes.collections if type(c) is QuadMesh and c.get_clim() == (0, 1)]
    return np.ma.filled(mesh.get_array(), np.nan)


def squares(axes, mark: str) -> set[tuple[int, int]]:
    """Row and column of every square that carries a mark."""
    found = [line.get_xydata() for line in axes.lines if line.get_marker() == mark]
    assert all((xy % 1 == 0.5).all() for xy in found)
    return {(int(y), int(x)) for xy in found for x, y in xy}


def test_map_shows_the_skill_of_every_cell_with_evidence_and_leaves_the_others_blank(grid):
    first, second = panels(headline(grid))
    (control,) = panels(maps(grid, ["control"]))
    for axes, target in ((first, "answer"), (second, "model_answer"), (control, "control")):
        plane = grid.plane(target).transpose("layer", "step", ...)
        expected = np.where(plane.p_evidence <= 0.05, plane.skill, np.nan)
        np.testing.assert_array_equal(drawn(axes), expected)
        assert axes.get_xlim() == (0, 12) and axes.get_ylim() == (0, 8)  # layer 0 at the bottom
        assert (axes.get_xlabel(), axes.get_ylabel()) == (STEP_LABEL, LAYER_LABEL)
    assert np.isfinite(drawn(first)).any() and np.isnan(drawn(second)).any()
    assert np.isnan(drawn(control)).all()


def test_a_map_without_evidence_says_so_and_one_with_some_does_not(grid):
    (control,) = panels(maps(grid, ["control"]))
    assert [text.get_text() for text in control.texts] == ["0 of 96 cells with evidence"]
    (start,) = panels(maps(grid, ["start"]))
    assert len(start.texts) == 0


def test_blank_last_steps_say_how_often_an_input_is_right(grid):
    data = grid.dataset.copy(deep=True)
    data.p_evidence.loc[{"target": "answer", "step": slice(7, None)}] = 0.2
    data.reference.loc[{"target": "answer", "step": slice(7, None)}] = 0.81
    data.reference.loc[{"target": "answer", "step": 11}] = 0.93
    (axes,) = panels(maps(Grid(data), ["answer"]))
    (said,) = axes.texts
    assert said.get_text().endswith("81 to 93 %") and said.get_position() == (9.5, 4)
    greyer = data.copy(deep=True)
    greyer.reference.loc[{"target": "answer", "step": slice(9, None)}] = 0.97
    (said,) = panels(maps(Grid(greyer), ["answer"]))[0].texts
    assert said.get_text().endswith("on\n97 %") and said.get_position() == (10.5, 4)
    source = data.reference_source.copy()
    source.loc[{"target": "answer", "step": 8}] = "majority"  # a guess is no input
    assert len(panels(maps(Grid(data.assign(reference_source=source)), ["answer"]))[0].texts) == 0
    data.p_evidence.loc[{"target": "answer", "step": 10, "layer": 0}] = 0.01  # two columns are left: no room for words
    assert len(panels(maps(Grid(data), ["answer"]))[0].texts) == 0
    data.p_evidence.loc[{"target": "start", "step": slice(7, None)}] = 0.2  # has no inputs to beat
    assert len(panels(maps(Grid(data), ["start"]))[0].texts) == 0


def test_grey_squares_are_those_where_an_input_leaves_no_room(grid):
    data = grid.dataset.copy(deep=True)
    data.reference.loc[{"target": "answer", "step": slice(9, 10)}] = CEILING + 0.01
    data.reference.loc[{"target": "answer", "step": 11}] = CEILING
    data.skill.loc[{"target": "answer", "step": slice(9, 10)}] = np.nan
    (axes,) = panels(maps(Grid(data), ["answer"]))
    (grey,) = [c for c in axes.collections if type(c) is QuadMesh and c.get_clim() != (0, 1)]
    assert {to_hex(c) for c in grey.get_cmap()(np.linspace(0, 1, 3))} == {UNDEFINED}
    assert {int(x) for x in np.nonzero(~np.ma.getmaskarray(grey.get_array()))[1]} == {9, 10}


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


def test_cells_without_any_p_are_blank_too():
    evaluated = synthetic(2, 3, 40, targets=(ANSWER,))
    first = evaluated.results[0]
    few = replace(first, test=replace(first.test, keys=np.array([f"t{i % 11}" for i in range(40)])))
    (axes,) = panels(maps(build_grid(replace(evaluated, results=(few,)), draws=20), ["answer"]))
    assert np.isnan(drawn(axes)).all() and squares(axes, "o") == set()
    assert axes.texts[0].get_text().startswith("0 of 6 cells")


@pytest.mark.slow
def test_dots_stand_in_the_cells_that_read_more_than_x0_hat_shows(grid):
    plane = grid.plane("answer").transpose("layer", "step", ...)
    inside = ((plane.p_x0 <= 0.05) & (plane.p_evidence <= 0.05)).values
    assert 0 < inside.sum() < inside.size
    (axes,) = panels(maps(grid, ["answer"]))
    assert squares(axes, "o") == set(map(tuple, np.argwhere(inside).tolist()))


def test_border_of_one_cell_is_its_four_sides():
    assert len(border(np.array([[False, False], [False, True]]))) == 4
    assert len(border(np.array([[True, True], [True, True]]))) == 8
    assert border(np.zeros((3, 3), dtype=bool)) == []


def test_legend_explains_only_what_occurs(grid):
    def explained(shown: Grid, *targets: str) -> set[str]:
        figure = maps(shown, targets)
        (legend,) = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
        return {text.get_text().partition(":")[0] for text in legend.get_texts()}

    assert explained(grid, "control") == {"blank"}
    assert explained(grid, "start") == {"star"}
    data = grid.dataset.copy(deep=True)
    data.reference.loc[{"target": "start", "step": 3}] = 0.96
    assert explained(Grid(data), "start") == {"star", "grey"}
    assert explained(grid, "answer", "start", "control") == {"star", "dot", "blank"}  # in the place of a fourth map


def test_lightness_falls_with_skill_and_no_skill_is_not_blank():
    """The map reads the same printed in grey."""
    rgb = skill_colours()(np.linspace(0, 1, 300))[:, :3]
    light = rgb @ [0.2126, 0.7152, 0.0722]
    assert light[0] < 0.95 and light[-1] < 0.2
    assert (np.diff(light) <= 1e-3).all()


def test_curves_are_the_accuracies_and_parsed_answers_only_where_decoded(grid):
    figure = curves(grid, ["answer", "model_answer"], layers=[0, 7])
    shown = np.array(panels(figure), dtype=object).reshape(2, 2)
    for row, target in zip(shown, ("answer", "model_answer"), strict=True):
        plane, best = grid.plane(target), grid.best(target).cell
        for axes, layer in zip(row, (0, 7), strict=True):
            lines = {line.get_label(): line for line in axes.lines}
            assert axes.get_title("left") == f"layer {layer}" + (" (best cell)" if layer == best.layer else "")
            (probe,) = (line for label, line in lines.items() if label.startswith("probe of the layer"))
            np.testing.assert_array_equal(probe.get_ydata(), plane.accuracy.sel(layer=layer))
            parsed = lines[BASELINE_STYLE[X0_PARSED][0]]
            np.testing.assert_array_equal(
                parsed.get_ydata(), plane.baseline_accuracy.sel(baseline=X0_PARSED).dropna("step")
            )
            assert parsed.get_xdata().tolist() == [0, 2, 5, 8, 11]
            assert len(axes.collections) == 1  # an interval band
            np.testing.assert_array_equal(lines["best input (skill 0)"].get_ydata(), plane.reference)
            assert set(lines["chance"].get_ydata()) == {float(plane.chance)}
            own = [line for line in axes.lines if set(line.get_ydata()) == {grid.dataset.attrs["model_accuracy"]}]
            assert len(own) == (target == "answer")
            assert axes.get_xlabel() == "step (0 = noisiest)"
    assert len(texts(figure)) == len(set(texts(figure))) == 6


def test_default_layers_spread_and_hold_the_best(grid):
    chosen = default_layers(grid, ["answer", "model_answer"])
    best = {grid.best(target).cell.layer for target in ("answer", "model_answer")}
    assert best <= set(chosen) and len(chosen) == 4 and chosen == sorted(chosen)
    spread = [0, 2, 5, 7]
    assert sum(min(abs(a - b) for b in chosen) for a in spread) <= 2 * len(best)  # a neighbour takes the place of each
    assert default_layers(grid, ["answer"], most=1) == [grid.best("answer").cell.layer]


def test_frame_maps_cross_at_the_best_cell(framed):
    left, right = panels(frame_maps(framed, "answer"))
    cell = framed.best("answer").cell
    data = framed.dataset.sel(target="answer", branch=cell.branch)
    skill = data.skill.where(data.p_evidence <= 0.05)
    np.testing.assert_array_equal(drawn(left), skill.sel(step=cell.step).transpose("layer", "position"))
    np.testing.assert_array_equal(drawn(right), skill.sel(layer=cell.layer).transpose("position", "step"))
    assert np.isfinite(drawn(left)).any() and np.isfinite(drawn(right)).any()
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
    assert [text.get_text() for text in axes.texts if "input" not in text.get_text()] == ["high", "low"]
    assert any(line.get_xdata()[0] == 2 for line in axes.lines if len(line.get_xdata()) == 2)


def test_colour_of_dots_is_not_on_the_map():
    rgb = np.array(matplotlib.colors.to_rgb(SHOWN))
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
    words = check_words(figure)
    assert apart([box for t, box in words.items() if "\n" in t.get_text() and "problems" in t.get_text()])  # titles


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
