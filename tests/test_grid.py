"""The grid: shapes and names others script against, choices made on validation, numbers checked by hand."""

from __future__ import annotations

from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
import xarray as xr

from cosprobe.grid import Grid
from cosprobe.metrics import cluster_bootstrap, max_t_permutation
from cosprobe.scoring import Evaluated, SplitPredictions, TargetPredictions, build_grid
from cosprobe.tasks import Target
from cosprobe.types import SOURCES, Cell

ANSWER = Target("answer", 4, "candidate", "answer", ("one_exit",))
CHOICE = Target("choice", 4, "candidate", "choice", ("choice",))
START = Target("start", 9, "problem", "perception", ("one_exit", "choice"))
DOORS = Target("corridors", 2, "region", "perception", ("one_exit", "choice"))
CONTROL = Target("control", 4, "candidate", "control", ("one_exit", "choice"))


def truth(target: str, site: str, step: int, layers: int, steps: int) -> float:
    """Share of samples a cell gets right in the synthetic world: the answer is computed in the middle layers of the
    first step, the choice settles along steps, inputs and x0-hat follow."""
    time = step / max(1, steps - 1)
    if target == "control":
        return 0.25
    if target in ("start", "corridors"):
        return 0.93 if site in SOURCES[:2] else 0.95 - 0.4 * (int(site) / layers if site.isdigit() else 0.8)
    final, first = (0.93, 0.36) if target == "answer" else (0.97, 0.34)
    if site in ("embed", "x_t"):
        return first - 0.06 * (site == "x_t") + (final - first) * time**2
    if site in ("x0_latent", "x0_readout"):
        lead = 0.72 if target == "answer" else 0.5
        return lead + (final - lead) * min(1.0, 1.6 * time)
    depth = int(site) / (layers - 1)
    settled = 1 / (1 + np.exp(-14 * (depth - (0.62 if target == "answer" else 0.5) + 0.9 * time)))
    ceiling = final if target == "answer" else 0.55 + 0.42 * (1 - np.exp(-6 * time))
    return first + (ceiling - first) * settled


def synthetic(
    layers=8, steps=20, samples=196, places=("all",), branches=("cond",), targets=(ANSWER, CHOICE), seeds=1, seed=0
) -> Evaluated:
    """Predictions of a bank on a world whose accuracies are `truth`, errors correlated between cells."""
    rng = np.random.default_rng(seed)
    sites = (*map(str, range(layers)), *SOURCES)
    cells = tuple(Cell(t, s, b, p) for t in range(steps) for s in sites for b in branches for p in places)
    decoded = set(np.linspace(0, steps - 1, min(5, steps)).astype(int).tolist())

    def guesses(target: Target, labels: np.ndarray, shares: list[float]) -> np.ndarray:
        shared = rng.normal(size=labels.shape)
        noise = 0.85 * shared + 0.53 * rng.normal(size=(len(shares), *labels.shape))
        cut = np.array([NormalDist().inv_cdf(min(max(x, 0.01), 0.99)) for x in shares])
        right = noise < cut.reshape(-1, *[1] * labels.ndim)
        return np.where(right, labels, (labels + rng.integers(1, target.classes, right.shape)) % target.classes)

    def split(target: Target, count: int, name: str) -> SplitPredictions:
        keys = np.array([f"{name}{i // seeds}" for i in range(count)])
        labels = rng.integers(target.classes, size=(count, 4) if target.form == "region" else count)
        shares = [truth(target.name, c.site, c.step, layers, steps) * (0.6 if c.place == "0" else 1) for c in cells]
        predicted = guesses(target, labels, shares)
        if target.role == "control":
            predicted = rng.integers(target.classes, size=predicted.shape)
        if target.role not in ("answer", "choice"):
            return SplitPredictions(labels, keys, predicted)
        shares = [truth(target.name, "x0_readout", t, layers, steps) for t in range(steps)]
        readout = np.where(np.isin(np.arange(steps), list(decoded))[:, None], guesses(target, labels, shares), -1)
        drawn = labels if target.role == "choice" else guesses(target, labels, [0.9])[0]
        return SplitPredictions(labels, keys, predicted, readout, drawn)

    return Evaluated(
        cells,
        tuple("high" if t < steps // 2 else "low" for t in range(steps)) if steps > 30 else ("transformer",) * steps,
        tuple(
            TargetPredictions(
                t, rng.integers(t.classes, size=(300, 4) if t.form == "region" else 300),
                split(t, samples, "v"), split(t, samples, "t"), np.full(len(cells), 0.01), 7 * (t.role == "choice"),
            )
            for t in targets
        ),
    )  # fmt: skip


@pytest.fixture(scope="module")
def grid() -> Grid:
    """8 layers x 6 steps, every form of target."""
    evaluated = synthetic(steps=6, samples=120, targets=(ANSWER, CHOICE, START, DOORS, CONTROL))
    return build_grid(evaluated, draws=200, provenance={"model": {"name": "mini"}, "seed": 0})


def tiny(
    right: dict[str, tuple[float, float]], target: Target = ANSWER, samples: int = 20, steps: int = 1, **changes
) -> Evaluated:
    """A grid whose cells are right on exactly these shares of (validation, test); x0_readout likewise if given."""

    def rows(share: float) -> np.ndarray:
        labels = np.zeros(samples, dtype=int)
        return np.where(np.arange(samples) < round(share * samples), labels, 1)

    sites = [site for site in right if site != "x0_readout"]
    cells = tuple(Cell(t, site, "cond", "all") for t in range(steps) for site in sites)
    labels, keys = np.zeros(samples, dtype=int), np.arange(samples)
    parts = []
    for i in (0, 1):
        readout = np.tile(rows(right["x0_readout"][i]), (steps, 1)) if "x0_readout" in right else None
        predicted = np.stack([rows(right[cell.site][i]) for cell in cells])
        parts.append(SplitPredictions(labels, keys, predicted, readout))
    never = np.full(40, target.classes - 1)  # the majority guess is always wrong
    result = TargetPredictions(target, never, *parts, np.ones(len(cells)))
    return Evaluated(cells, ("transformer",) * steps, (replace(result, **changes),))


def only(evaluated: Evaluated) -> xr.Dataset:
    return build_grid(evaluated, draws=50).dataset.isel(target=0, place=0)


def test_names_that_others_script_against(grid):
    data = grid.dataset
    assert dict(data.sizes) == {"target": 5, "step": 6, "layer": 8, "place": 1, "baseline": 5}
    for name in ("accuracy", "lower", "upper", "skill", "p_permutation", "excess", "validation_accuracy", "lambda"):
        assert data[name].dims == ("target", "step", "layer", "place")
        assert data[name].attrs["long_name"]
    assert data.chance.dims == ("target",)
    assert data.baseline_accuracy.dims == ("target", "baseline", "step", "place")
    assert data.baseline.values.tolist() == ["chance", "embed", "x_t", "x0_readout", "x0_latent"]
    assert data.layer.dtype.kind == "i"
    assert data.expert.dims == ("step",)
    assert str(data.branch.values) == "cond"
    assert grid.provenance == {"model": {"name": "mini"}, "seed": 0}
    assert grid.with_role("answer", "control") == ("answer", "control")


def test_branches_and_places_are_dimensions_where_there_are_several():
    evaluated = synthetic(2, 3, 40, places=("all", "0", "1"), branches=("cond", "uncond"), targets=(ANSWER,))
    built = build_grid(replace(evaluated, experts=("high", "high", "low")), draws=20)
    assert built.dataset.accuracy.dims == ("target", "step", "layer", "branch", "place")
    assert built.dataset.reference.dims == ("target", "step", "branch", "place")
    assert built.dataset.expert.values.tolist() == ["high", "high", "low"]
    result = evaluated.results[0]
    for i, cell in enumerate(evaluated.cells):
        right = (result.test.predicted[i] == result.test.labels).mean()
        if cell.site not in SOURCES:
            assert float(built.at("answer", cell).accuracy) == pytest.approx(right)
        else:
            where = {"baseline": cell.site, "step": cell.step, "branch": cell.branch, "place": cell.place}
            assert float(built.dataset.baseline_accuracy.sel(target="answer", **where)) == pytest.approx(right)
    assert built.plane("answer", place="1", branch="uncond").accuracy.dims == ("step", "layer")
    best = built.best("answer")
    assert float(built.plane("answer").accuracy.sel(step=best.cell.step, layer=int(best.cell.site))) == best.accuracy


def test_intervals_and_p_are_those_of_metrics_over_the_layers_only(grid):
    evaluated = synthetic(steps=6, samples=120, targets=(ANSWER, CHOICE, START, DOORS, CONTROL))
    rows = [i for i, cell in enumerate(evaluated.cells) if cell.site not in SOURCES]
    for result in evaluated.results:
        test, plane = result.test, grid.plane(result.target.name)
        p = max_t_permutation(test.predicted[rows], test.labels, test.keys, 200, 0)
        np.testing.assert_allclose(plane.p_permutation.values.ravel(), p)
        right = (test.predicted[rows] == test.labels).reshape(len(rows), 120, -1).mean(-1)
        np.testing.assert_allclose(plane.accuracy.values.ravel(), right.mean(1))
        np.testing.assert_allclose(plane.lower.values.ravel(), cluster_bootstrap(right, test.keys, 200, 0)[0])
        np.testing.assert_allclose(plane.upper.values.ravel(), cluster_bootstrap(right, test.keys, 200, 0)[1])


def test_control_gives_evidence_in_one_grid_of_twenty_and_a_decodable_target_always():
    alarms = 0
    for seed in range(25):
        built = build_grid(synthetic(4, 5, 80, targets=(ANSWER, CONTROL), seed=seed), draws=99)
        assert built.best("answer").p <= 0.05
        alarms += bool((built.dataset.p_permutation.sel(target="control") <= 0.05).any())
    assert alarms <= 5


def test_reference_is_chosen_on_validation_and_read_on_test():
    data = only(tiny({"0": (0.9, 0.9), "embed": (0.6, 0.5), "x_t": (0.5, 0.7)}))
    assert str(data.reference_source.values[0]) == "embed"
    assert float(data.reference[0]) == 0.5
    assert float(data.skill[0, 0]) == pytest.approx((0.9 - 0.5) / (1 - 0.5))
    chance = only(tiny({"0": (0.9, 0.9), "embed": (0.2, 0.9)}, train_labels=np.ones(4, dtype=int)))
    assert str(chance.reference_source.values[0]) == "chance"
    assert float(chance.reference[0]) == 0.25


def test_skill_is_undefined_where_the_inputs_leave_no_room():
    assert np.isnan(only(tiny({"0": (1.0, 1.0), "x_t": (1.0, 1.0)})).skill).all()
    assert np.isfinite(only(tiny({"0": (1.0, 1.0), "x_t": (0.95, 0.95)})).skill).all()


def test_perception_is_measured_from_chance():
    seen = tiny({"0": (0.9, 0.9), "embed": (0.8, 0.8)}, START, train_labels=np.array([3, 3, 0]))
    data = only(seen)
    assert str(data.reference_source.values[0]) == "chance"
    assert float(data.skill[0, 0]) == pytest.approx(0.9)  # nobody guesses 3 right: chance is 0


def test_chance_is_the_training_majority_and_never_under_a_blind_guess_among_candidates():
    assert float(only(tiny({"0": (1, 1)}, train_labels=np.array([0, 0, 1]))).chance) == 1.0
    assert float(only(tiny({"0": (1, 1)}, train_labels=np.array([2, 2, 1]))).chance) == 0.25
    assert float(only(tiny({"0": (1, 1)}, START, train_labels=np.array([2, 2, 1]))).chance) == 0.0


def test_visible_is_the_stronger_on_validation_of_readout_and_latent():
    data = only(tiny({"0": (0.9, 0.9), "x0_latent": (0.6, 0.8), "x0_readout": (0.7, 0.5)}))
    assert str(data.visible_source.values[0]) == "x0_readout"
    assert float(data.visible[0]) == 0.5
    assert float(data.excess[0, 0]) == pytest.approx(0.4)
    data = only(tiny({"0": (0.9, 0.9), "x0_latent": (0.6, 0.8)}))
    assert (str(data.visible_source.values[0]), float(data.visible[0])) == ("x0_latent", 0.8)
    data = only(tiny({"0": (0.9, 0.9)}))
    assert str(data.visible_source.values[0]) == ""
    assert np.isnan(data.excess).all()
    assert np.isnan(data.excess_lower).all()


def test_excess_interval_is_paired():
    """The probe is right wherever the picture is, and on two samples more: the difference hardly varies."""
    data = only(tiny({"0": (0.6, 0.6), "x0_latent": (0.5, 0.5)}))
    difference = (np.arange(20) >= 10) & (np.arange(20) < 12)
    lower, upper = cluster_bootstrap(difference[None].astype(float), np.arange(20), 50)
    assert float(data.excess_lower[0, 0]) == pytest.approx(lower[0])
    assert float(data.excess_upper[0, 0]) == pytest.approx(upper[0])
    assert lower[0] >= 0


def test_steps_that_were_not_decoded_have_no_readout(grid):
    readout = grid.dataset.baseline_accuracy.sel(baseline="x0_readout", place="all")
    np.testing.assert_array_equal(np.isnan(readout.sel(target="answer")), [False, False, False, False, True, False])
    assert np.isnan(readout.sel(target="start")).all()
    assert str(grid.dataset.visible_source.sel(target="answer", step=4).values[0]) == "x0_latent"


def test_samples_without_a_label_change_nothing_but_are_not_counted():
    clean = synthetic(3, 2, 40, targets=(CHOICE, DOORS))
    rng = np.random.default_rng(9)

    def padded(split: SplitPredictions) -> SplitPredictions:
        count = len(split.keys)
        at = rng.permutation(2 * count).argsort()  # clean samples and samples without label, interleaved
        at = np.concatenate([np.sort(at[:count]), np.sort(at[count:])]).argsort()
        missing = np.full_like(split.labels, -1)
        wild = rng.integers(0, 2, split.predicted.shape)
        return SplitPredictions(
            np.concatenate([split.labels, missing])[at],
            np.concatenate([split.keys, split.keys])[at],
            np.concatenate([split.predicted, wild], axis=1)[:, at],
            None if split.readout is None else np.concatenate([split.readout, split.readout * 0], axis=1)[:, at],
            None if split.drawn is None else np.concatenate([split.drawn, split.drawn * 0])[at],
        )

    results = tuple(replace(r, validation=padded(r.validation), test=padded(r.test)) for r in clean.results)
    expected, found = build_grid(clean, draws=50).dataset, build_grid(replace(clean, results=results), draws=50).dataset
    xr.testing.assert_identical(found, expected)
    assert found.n_test.values.tolist() == [40, 40]
    assert found.n_none.values.tolist() == [7, 0]


def test_best_is_chosen_on_validation_and_breaks_ties_by_step_then_layer():
    best = build_grid(tiny({"0": (0.5, 1.0), "3": (0.9, 0.6), "7": (0.8, 0.9)}), draws=20).best("answer")
    assert (best.cell, best.accuracy, best.validation_accuracy) == (Cell(0, "3", "cond", "all"), 0.6, 0.9)
    tied = tiny({"10": (0.9, 0.6), "2": (0.9, 0.6), "embed": (1.0, 1.0)}, steps=3)
    assert build_grid(tied, draws=20).best("answer").cell == Cell(0, "2", "cond", "all")
    weak = replace(tied.results[0].validation, predicted=tied.results[0].validation.predicted.copy())
    weak.predicted[:3] = 3  # step 0 fails on validation: the next step wins
    later = replace(tied, results=(replace(tied.results[0], validation=weak),))
    assert build_grid(later, draws=20).best("answer").cell == Cell(1, "2", "cond", "all")


def test_model_accuracy_counts_none_as_wrong_and_agreement_leaves_it_out():
    evaluated = tiny({"0": (0.5, 0.5)})
    drawn = np.array([0] * 8 + [1] * 4 + [-1] * 8)
    test = replace(evaluated.results[0].test, drawn=drawn)
    built = build_grid(replace(evaluated, results=(replace(evaluated.results[0], test=test),)), draws=50)
    assert built.dataset.attrs["model_accuracy"] == pytest.approx(8 / 20)
    assert built.dataset.attrs["model_accuracy_lower"] < 0.4 < built.dataset.attrs["model_accuracy_upper"]
    assert float(built.dataset.agreement.squeeze()) == pytest.approx((8 + 2) / 12)  # the probe says 0 ten times
    assert np.isnan(build_grid(evaluated, draws=20).dataset.attrs["model_accuracy"])


def test_cells_that_were_not_captured_are_empty():
    evaluated = tiny({"0": (0.9, 0.9), "1": (0.8, 0.8)}, steps=2)
    holes = replace(evaluated, cells=(*evaluated.cells[:3], Cell(5, "4", "cond", "all")))
    data = build_grid(replace(holes, experts=("a",) * 3), draws=20).dataset.isel(target=0, place=0)
    assert data.step.values.tolist() == [0, 1, 5]
    assert data.layer.values.tolist() == [0, 1, 4]
    np.testing.assert_array_equal(np.isfinite(data.accuracy), [[1, 1, 0], [1, 0, 0], [0, 0, 1]])
    np.testing.assert_array_equal(np.isfinite(data.p_permutation), np.isfinite(data.accuracy))


def test_saved_grid_comes_back_the_same(grid, tmp_path):
    path = grid.save(tmp_path / "run" / "report" / "grid.nc")
    for place in (path, path.parent, path.parent.parent, str(path)):
        loaded = Grid.load(place)
        xr.testing.assert_identical(loaded.dataset, grid.dataset)
        assert loaded.best("choice") == grid.best("choice")
    grid.save(path)  # over an earlier one
    assert [p.name for p in path.parent.iterdir()] == ["grid.nc"]


def test_missing_and_damaged_files_are_named(grid, tmp_path):
    with pytest.raises(ValueError, match=r"grid '.*nowhere' is missing: expected grid.nc or a run folder"):
        Grid.load(tmp_path / "nowhere")
    path = grid.save(tmp_path / "grid.nc")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"grid '.*grid.nc' is damaged"):
        Grid.load(path)
    xr.Dataset({"a": 1}).to_netcdf(path)
    with pytest.raises(ValueError, match=r"grid '.*grid.nc' is damaged"):
        Grid.load(path)


def test_a_failed_save_leaves_nothing(grid, tmp_path, monkeypatch):
    def broken(self, path, **settings):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(xr.Dataset, "to_netcdf", broken)
    with pytest.raises(OSError, match="disk full"):
        grid.save(tmp_path / "grid.nc")
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_one_line_that_names_it(grid):
    with pytest.raises(ValueError, match=r"^target='anwser': expected one of answer, choice, .*$"):
        grid.best("anwser")
    with pytest.raises(ValueError, match=r"^target 'answer' has no test samples: expected at least 1"):
        evaluated = tiny({"0": (1, 1)})
        empty = replace(evaluated.results[0].test, labels=np.full(20, -1))
        build_grid(replace(evaluated, results=(replace(evaluated.results[0], test=empty),)))
    with pytest.raises(ValueError, match="expected at least one layer"):
        build_grid(tiny({"embed": (1, 1)}))
    with pytest.raises(ValueError, match="2 experts: expected one per step, 1"):
        build_grid(replace(tiny({"0": (1, 1)}), experts=("a", "b")))
    with pytest.raises(ValueError, match=r"predictions of shape \(1, 20\), expected \(2, 20\)"):
        build_grid(replace(tiny({"0": (1, 1)}), cells=(Cell(0, "0", "c", "all"), Cell(0, "1", "c", "all"))))
