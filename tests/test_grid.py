"""The grid: shapes and names others script against, choices made on validation, numbers checked by hand."""

from __future__ import annotations

from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
import xarray as xr

from cosprobe.grid import BASELINES, Grid
from cosprobe.latency import latency
from cosprobe.metrics import cluster_bootstrap, max_t_bootstrap, max_t_permutation
from cosprobe.predictions import Evaluated, SplitPredictions, TargetPredictions
from cosprobe.scoring import MEANING, _shown, build_grid
from cosprobe.tasks import Target
from cosprobe.types import EVERY_STEP, SOURCES, Cell

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
    assert dict(data.sizes) == {"target": 5, "step": 6, "layer": 8, "place": 1, "baseline": 12}
    for name in (
        "accuracy", "lower", "upper", "skill", "p_skill", "p_permutation", "excess", "p_excess", "validation_accuracy",
        "lambda", "agreement", "knew", "selectivity", "temperature", "ece", "ece_raw", "brier",
    ):  # fmt: skip
        assert data[name].dims == ("target", "step", "layer", "place")
        assert data[name].attrs["long_name"]
    assert data.chance.dims == ("target",)
    for name in ("baseline_accuracy", "baseline_lower", "baseline_upper", "baseline_validation"):
        assert data[name].dims == ("target", "baseline", "step", "place")
    assert data.baseline.values.tolist() == [
        "chance", "majority", "noise", "first_frame", "prompt", "nuisance", "embed", "x_t", "x0_readout", "x0_latent",
        "permuted_weights", "fresh_weights",
    ]  # fmt: skip
    for name in ("latency", "latency_lower", "latency_upper", "latency_at_most", "lag", "lag_lower", "lag_upper"):
        assert data[name].dims == ("target", "layer", "place")
    for name in ("visible_latency", "visible_latency_lower", "visible_latency_upper", "visible_latency_at_most"):
        assert data[name].dims == ("target", "place")
    for name in ("depth", "depth_lower", "depth_upper"):
        assert data[name].dims == ("target", "step", "place")
    assert set(MEANING) == set(data.data_vars)
    assert all(data[name].attrs["long_name"] == meaning for name, meaning in MEANING.items())
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
    assert float(data.skill[0, 0]) == pytest.approx((0.9 - 1 / 9) / (1 - 1 / 9))  # embed is no reference here
    often = only(tiny({"0": (0.9, 0.9), "embed": (0.95, 0.95)}, START, train_labels=np.array([0, 3, 0])))
    assert str(often.reference_source.values[0]) == "majority"


@pytest.mark.parametrize(("target", "blind"), [(ANSWER, 0.25), (START, 1 / 9), (DOORS, 0.5)])
def test_chance_and_majority_are_two_baselines_and_the_better_one_is_the_chance(target, blind):
    region = target.form == "region"
    for guess, share in ((0, 1.0), (1, 0.0)):  # every label is 0
        train = np.full((9, 4) if region else 9, guess)
        train[:4] = 1 - guess  # not more often than the guess
        evaluated = tiny({"0": (1, 1)}, target, train_labels=train)
        if region:
            parts = [evaluated.results[0].validation, evaluated.results[0].test]
            parts = [replace(p, labels=np.zeros((20, 4), int), predicted=np.zeros((1, 20, 4), int)) for p in parts]
            evaluated = replace(evaluated, results=(replace(evaluated.results[0], validation=parts[0], test=parts[1]),))
        data = only(evaluated)
        accuracy = data.baseline_accuracy.isel(step=0)
        assert float(accuracy.sel(baseline="chance")) == pytest.approx(blind)
        assert float(accuracy.sel(baseline="majority")) == share
        assert float(data.chance) == pytest.approx(max(blind, share))
        assert float(data.baseline_lower.sel(baseline="chance").isel(step=0)) == pytest.approx(blind)
    tied = only(tiny({"0": (1, 1)}, train_labels=np.array([2, 1, 2, 1])))  # of equals the smallest
    assert float(tied.baseline_accuracy.sel(baseline="majority").isel(step=0)) == 0


def test_sources_of_the_whole_run_are_inputs_at_every_step():
    evaluated = tiny({"0": (0.9, 0.9), "embed": (0.3, 0.3), "noise": (0.2, 0.4), "nuisance": (0.6, 0.5)}, steps=3)
    first = [i for i, cell in enumerate(evaluated.cells) if cell.step == 0 or cell.is_layer or cell.site == "embed"]
    cells = [evaluated.cells[i] for i in first]
    cells = tuple(replace(c, step=EVERY_STEP) if c.site in ("noise", "nuisance") else c for c in cells)
    result = evaluated.results[0]
    parts = [replace(p, predicted=p.predicted[first]) for p in (result.validation, result.test)]
    result = replace(result, validation=parts[0], test=parts[1], lambdas=np.ones(len(cells)))
    fixed = replace(evaluated, cells=cells, results=(result,))
    data = only(fixed)
    assert data.step.values.tolist() == [0, 1, 2]
    np.testing.assert_allclose(data.baseline_accuracy.sel(baseline="noise"), [0.4] * 3)
    np.testing.assert_allclose(data.baseline_validation.sel(baseline="nuisance"), [0.6] * 3)
    assert data.reference_source.values.tolist() == ["nuisance"] * 3
    np.testing.assert_allclose(data.reference, 0.5)
    np.testing.assert_allclose(data.skill[:, 0], 0.8)
    assert np.isnan(data.baseline_accuracy.sel(baseline=["prompt", "permuted_weights", "fresh_weights"])).all()
    own = replace(result, target=replace(ANSWER, role="nuisance"))  # it is one of the nuisances itself
    data = only(replace(fixed, results=(own,)))
    assert np.isnan(data.baseline_accuracy.sel(baseline="nuisance")).all()
    assert "nuisance" not in data.reference_source.values


def test_corrected_p_of_skill_and_excess_are_those_of_metrics(grid):
    evaluated = synthetic(steps=6, samples=120, targets=(ANSWER, CHOICE, START, DOORS, CONTROL))
    test, at = evaluated.results[0].test, {cell: i for i, cell in enumerate(evaluated.cells)}
    plane, layers = grid.plane("answer"), [cell for cell in evaluated.cells if cell.is_layer]
    right = (test.predicted == test.labels).astype(float)
    readout = (test.readout == test.labels).astype(float)
    guess = np.bincount(evaluated.results[0].train_labels).argmax()
    rows = {"chance": np.full(120, 0.25), "majority": (test.labels == guess).astype(float)}
    trial = plane.baseline_validation.sel(baseline="x0_readout")
    shown = {step: step for step in range(6)} | {4: max((3, 5), key=lambda step: float(trial.sel(step=step)))}
    for against, p in (("reference", "p_skill"), ("visible", "p_excess")):
        other = []
        for cell in layers:
            source = str(plane[f"{against}_source"].sel(step=cell.step).values)
            if source in rows:
                other.append(rows[source])
            else:
                other.append(
                    readout[shown[cell.step]] if source == "x0_readout" else right[at[replace(cell, site=source)]]
                )
        difference = right[[at[cell] for cell in layers]] - np.array(other)
        expected = max_t_bootstrap(difference, test.keys, 200, 0)[0]
        found = [float(plane[p].sel(step=cell.step, layer=int(cell.site))) for cell in layers]
        np.testing.assert_allclose(found, expected)
    assert np.isnan(only(tiny({"0": (0.9, 0.9)})).p_excess).all()


def test_selectivity_is_the_distance_to_the_relabelled_control():
    evaluated = synthetic(3, 2, 60, targets=(ANSWER, START))
    twin = replace(ANSWER, name="answer_relabelled", role="relabelled")
    control = replace(synthetic(3, 2, 60, targets=(ANSWER,), seed=5).results[0], target=twin)
    data = build_grid(replace(evaluated, results=(*evaluated.results, control)), draws=20).dataset
    expected = data.accuracy.sel(target="answer").values - data.accuracy.sel(target="answer_relabelled").values
    np.testing.assert_array_equal(data.selectivity.sel(target="answer"), expected)
    assert np.isnan(data.selectivity.sel(target=["start", "answer_relabelled"])).all()


def test_knew_counts_the_probe_where_the_model_drew_it_wrong():
    evaluated = tiny({"0": (0.5, 0.5), "1": (0.9, 0.9)})  # right on the first ten, on the first eighteen
    drawn = np.array([0] * 6 + [1] * 9 + [-1] * 5)
    test = replace(evaluated.results[0].test, drawn=drawn)
    data = only(replace(evaluated, results=(replace(evaluated.results[0], test=test),)))
    assert int(data.n_wrong) == 14
    np.testing.assert_allclose(data.knew.isel(step=0), [4 / 14, 12 / 14])
    right = np.stack([np.arange(6, 20) < 10, np.arange(6, 20) < 18]).astype(float)
    lower, upper = cluster_bootstrap(right, np.arange(6, 20), 50)
    np.testing.assert_allclose(data.knew_lower.isel(step=0), lower)
    np.testing.assert_allclose(data.knew_upper.isel(step=0), upper)
    choice = replace(evaluated.results[0], test=test, target=replace(ANSWER, role="choice"))
    data = only(replace(evaluated, results=(choice,)))
    assert np.isnan(data.knew).all()
    assert int(data.n_wrong) == 0


def test_what_is_known_of_probabilities_is_passed_on_by_cell():
    trust = {"ece": np.array([0.1, 0.2, 0.3]), "temperature": np.array([1.0, 2.0, 3.0])}
    data = only(tiny({"0": (0.9, 0.9), "embed": (0.5, 0.5), "4": (0.9, 0.9)}, trust=trust))
    np.testing.assert_array_equal(data.ece.isel(step=0), [0.1, 0.3])
    np.testing.assert_array_equal(data.temperature.isel(step=0), [1.0, 3.0])
    assert np.isnan(data.brier).all()


def test_timing_is_that_of_the_targets_rows():
    evaluated = synthetic(4, 8, 120, targets=(ANSWER, CONTROL))
    data = build_grid(evaluated, draws=50).dataset.isel(place=0)
    result, at = evaluated.results[0].test, {cell: i for i, cell in enumerate(evaluated.cells)}
    right = (result.predicted == result.labels).astype(float)
    lines = np.stack([[right[at[Cell(t, str(n), "cond", "all")]] for t in range(8)] for n in range(4)])
    here = data.sel(target="answer")
    found = (here.p_permutation <= 0.05).any("step").values
    majority = int(np.bincount(evaluated.results[0].train_labels).argmax())
    better = str(here.reference_source.values[0]) == "majority" or float(here.chance) != 0.25
    guess = (result.labels == majority).astype(float) if better else np.full(120, 0.25)
    expected = latency(lines, np.tile(guess, (4, 1)), range(8), result.keys, found, 50, 0)
    np.testing.assert_allclose(here.latency, expected.value)
    np.testing.assert_allclose(here.latency_upper, expected.upper)
    np.testing.assert_array_equal(here.latency_at_most, expected.censored)
    assert np.isfinite(here.latency).any()
    if not (data.p_permutation.sel(target="control") <= 0.05).any():
        assert np.isnan(data.latency.sel(target="control")).all()


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


def test_a_step_that_was_not_decoded_is_held_against_the_readout_around_it(grid):
    """Step 4 is not decoded: what x0-hat shows there is its latents, or the readout of step 3 or 5."""
    data = grid.dataset.sel(target="answer", place="all")
    latent = float(data.baseline_validation.sel(baseline="x0_latent", step=4))
    near = {step: float(data.baseline_validation.sel(baseline="x0_readout", step=step)) for step in (3, 5)}
    assert max(near.values()) != latent
    source, step = ("x0_latent", 4) if latent > max(near.values()) else ("x0_readout", max(near, key=near.get))
    here = data.sel(step=4)
    assert str(here.visible_source.values) == source
    assert float(here.visible) == float(data.baseline_accuracy.sel(baseline=source, step=step))
    np.testing.assert_allclose(here.excess, here.accuracy - here.visible)


@pytest.mark.parametrize(
    ("decoded", "rows"),
    [
        ([1, 3], ([1, 1, 1, 3, 3], [1, 1, 3, 3, 3])),  # the last decoded step before, the first one after
        ([0, 1, 2, 3, 4], ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])),
        ([], ([-1] * 5, [-1] * 5)),
    ],
)
def test_what_x0_hat_shows_between_decoded_steps(decoded, rows):
    table = np.full((len(BASELINES), 5, 1, 1), -1)
    table[BASELINES.index("x0_readout"), decoded, 0, 0] = decoded
    table[BASELINES.index("x0_latent"), :, 0, 0] = 10 + np.arange(5)
    np.testing.assert_array_equal(_shown(table)[..., 0, 0], [*rows, [10, 11, 12, 13, 14]])


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
