"""Recomputes the numbers of a finished run from its files, with numpy, scipy and scikit-learn alone.

    python tests/oracles/derive.py runs/maze-layers answer     # run folder and target; a few minutes for the demo

Prints how far every number is from `report/grid.nc`. Nothing of the project is imported: each rule is written out here
a second time, as plainly as possible. For targets of the form `candidate` or `problem` in runs with one noise seed per
problem, one guidance branch, pooling by region with one position, and probes fitted with `logistic` or `newton`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import xarray as xr
from safetensors.numpy import load_file
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax
from scipy.stats import beta
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score

INPUTS = ("noise", "first_frame", "prompt", "difficulty", "embed", "x_t")
DRAWS, LEVEL, FOLDS = 4000, 0.025, 5


def read(folder: Path) -> tuple[dict[str, np.ndarray], dict]:
    """Every tensor of the store, samples first, and what its axes mean."""
    store = folder.parent / "store"
    paths = [store / name for name in json.loads((store / "manifest.json").read_text())["shards"]]
    shards = [load_file(path) for path in paths]
    names = [name for name in shards[0] if not name.startswith("untrained.")]
    with paths[0].open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    tensors = {name: np.concatenate([s[name] for s in shards]) for name in names}
    tensors |= load_file(next(store.glob("samples-*.safetensors")))  # labels, in the order of the shards
    return tensors, json.loads(header["__metadata__"]["notes"])


def standardise(rows: np.ndarray, train: np.ndarray) -> np.ndarray:
    """By mean and standard deviation of the training rows (over samples and regions); constant columns become 0."""
    mean, std = rows[train].mean(axis=(0, 1)), rows[train].std(axis=(0, 1))
    return (rows - mean) / np.where(std > 1e-6 * np.abs(mean), std, np.inf)


def fit(rows: np.ndarray, labels: np.ndarray, penalty: float) -> tuple[np.ndarray, np.ndarray]:
    """Minimises mean cross-entropy + penalty / 2 * |weights|^2. rows: [sample, region, column]. With several regions
    one scorer is shared by them and the softmax runs over regions; with one, scikit-learn fits a scorer per class."""
    count, regions, columns = rows.shape
    if regions == 1:
        classes = np.unique(labels)
        vectors = 2 if len(classes) == 2 else 1  # scikit-learn keeps one vector for two opposite ones
        found = LogisticRegression(C=vectors / (penalty * count), tol=1e-6, max_iter=10_000).fit(rows[:, 0], labels)
        weight, bias = found.coef_, found.intercept_
        if len(classes) == 2:
            weight, bias = np.stack([-weight[0], weight[0]]) / 2, np.array([-bias[0], bias[0]]) / 2
        whole, level = np.zeros((labels.max() + 1, columns)), np.full(labels.max() + 1, -np.inf)
        whole[classes], level[classes] = weight, bias
        return whole, level
    rows = rows - rows.mean(axis=1, keepdims=True)

    def objective(weight: np.ndarray) -> tuple[float, np.ndarray]:
        scores = rows @ weight
        loss = (logsumexp(scores, axis=1) - scores[np.arange(count), labels]).mean() + penalty / 2 * weight @ weight
        pull = softmax(scores, axis=1)
        pull[np.arange(count), labels] -= 1
        return loss, np.einsum("nr,nrc->c", pull, rows) / count + penalty * weight

    weight = minimize(
        objective,
        np.zeros(columns),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 5000, "ftol": 1e-15, "gtol": 1e-8},
    ).x
    return weight, np.zeros(1)


def scores(rows: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    return rows @ weight if rows.shape[1] > 1 else rows[:, 0] @ weight.T + bias


def loss_of(values: np.ndarray, labels: np.ndarray) -> float:
    return float((logsumexp(values, axis=1) - values[np.arange(len(labels)), labels]).sum())


def forms(
    data: dict[str, np.ndarray], name: str, step: int, train: np.ndarray, own: np.ndarray, shared: bool
) -> dict[str, np.ndarray]:
    """The ways of reading an input at a step, [sample, region, column]. shared: one scorer for all regions; else, and
    for the whole frame, all stands side by side. Standardised by all training samples; more columns than `own`, those
    of them that carry the target, become their principal axes."""
    found = {}
    for area in ("region", "whole"):
        values = data.get(f"input.{name}.{area}")  # sample, step, frame, part, channel
        if values is None:
            continue
        values = values[:, min(step, values.shape[1] - 1)].astype(np.float64)
        times = {"mean": values.mean(axis=1), "frames": np.concatenate(list(values.transpose(1, 0, 2, 3)), axis=-1)}
        for time in times if values.shape[1] > 1 else ("mean",):
            rows = times[time]
            rows = standardise(rows if area == "region" else rows.reshape(len(rows), 1, -1), train)
            rows = rows if area == "region" and shared else rows.reshape(len(rows), 1, -1)
            if rows.shape[2] > own.sum():
                flat = rows[own].reshape(-1, rows.shape[2])
                axes = np.linalg.svd(flat - flat.mean(axis=0), full_matrices=False)[2][: own.sum()]
                rows = (rows - flat.mean(axis=0)) @ axes.T
            found[f"{area}, {time}"] = rows
    return found


def chosen(rows: np.ndarray, y: np.ndarray, train: np.ndarray, held: np.ndarray, penalties: list[float]) -> np.ndarray:
    """What every sample is told by the fit whose penalty is right most often on `held`; on a tie the lower loss."""
    fits = [scores(rows, *fit(rows[train], y[train], penalty)) for penalty in penalties]
    rank = [(accuracy_score(y[held], v[held].argmax(axis=1)), -loss_of(v[held], y[held])) for v in fits]
    return fits[rank.index(max(rank))].argmax(axis=1)


def cross_validated(rows: np.ndarray, y: np.ndarray, keys: np.ndarray, penalties: list[float], seed: int) -> float:
    """Accuracy at the best penalty when every problem is predicted by the fit without its fold."""
    problems, problem = np.unique(keys, return_inverse=True)
    fold = (np.random.default_rng(seed).permutation(len(problems)) % FOLDS)[problem]
    right = np.zeros(len(penalties))
    for k in range(FOLDS):
        for i, penalty in enumerate(penalties):
            values = scores(rows[fold == k], *fit(rows[fold != k], y[fold != k], penalty))
            right[i] += (values.argmax(axis=1) == y[fold == k]).sum()
    return right.max() / len(y)


def weakest(right: np.ndarray, others: np.ndarray) -> np.ndarray:
    """p of every cell above each of the others. right: [step, layer, sample], others: [step, other, sample]. Signs of
    problems are turned at random, in all pairs alike; a pair is held against the largest statistic of each draw."""
    pairs = right[:, :, None].astype(float) - others[:, None].astype(float)
    length = np.sqrt((pairs**2).sum(axis=-1))
    signs = np.random.default_rng(99).choice([-1.0, 1.0], size=(pairs.shape[-1], DRAWS))
    statistic = pairs.sum(axis=-1) / np.where(length > 0, length, np.inf)
    largest = (pairs @ signs / np.where(length > 0, length, np.inf)[..., None]).max(axis=(0, 1, 2))
    p = (1 + (largest >= statistic[..., None] - 1e-9).sum(axis=-1)) / (1 + DRAWS)
    return np.where(length > 0, p, 1.0).max(axis=-1)


def by_permutation(said: np.ndarray, y: np.ndarray) -> np.ndarray:
    """p of every cell above chance: labels move between samples, the largest standardised accuracy of a draw counts."""
    rng, flat = np.random.default_rng(98), said.reshape(-1, len(y))
    hits = np.stack([(flat == labels).sum(axis=1) for labels in [y, *(rng.permutation(y) for _ in range(DRAWS))]])
    spread = hits.std(axis=0)
    z = (hits - hits.mean(axis=0)) / np.where(spread > 0, spread, np.inf)
    p = (1 + (z[1:].max(axis=1)[:, None] >= z[0] - 1e-9).sum(axis=0)) / (1 + DRAWS)
    return p.reshape(said.shape[:-1])


def derive(folder: Path, target: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Every number by its name in the grid: axes step and layer, or step alone; inputs as `accuracy of NAME`."""
    data, notes = read(folder)
    bank = load_file(folder / "probes" / "bank.safetensors")
    about = json.loads((folder / "probes" / "bank.json").read_text())
    described = next(t for t in about["targets"] if t["name"] == target)
    penalties, shared = about["provenance"]["probe"]["penalties"], described["form"] == "candidate"
    y = data.get(f"label.{target}", data["model_answer"])
    if target == "model_answer":  # of problems with several right answers, which carry no label of the answer
        y = np.where(data["label.answer"] < 0, y, -1)
    whole = [(y >= 0) & (data["split"] == i) for i in range(3)]
    everything, (train, validation, test) = data["split"] == 0, whole
    columns = [v[:, None, None, None, None] for k, v in data.items() if k.startswith("difficulty.")]
    columns = [(v - v[everything].mean()) / (v[everything].std() or np.inf) for v in columns]
    data["input.difficulty.whole"] = np.concatenate([v**k for v in columns for k in (1, 2)], axis=-1)

    # the frozen probes, applied as the bank says
    steps, layers = len(notes["steps"]), len(notes["hook_points"])
    said = np.empty((steps, layers, len(y)), dtype=int)
    for i, (step, layer, _, _) in enumerate(about["cells"]):
        at = notes["steps"].index(step), notes["hook_points"].index(str(layer))
        x = (data["features"][:, at[0] * layers + at[1]] - bank["mean"][i]) / np.where(
            bank["std"][i] > 0, bank["std"][i], np.inf
        )
        weight = bank[f"weights/{target}"][i]
        values = (x @ weight)[..., 0] if shared else x.reshape(len(x), -1) @ weight + bank[f"biases/{target}"][i]
        said[at] = values.argmax(axis=-1)
    right = (said == y)[..., test]
    out = {"accuracy": right.mean(axis=-1), "validation_accuracy": (said == y)[..., validation].mean(axis=-1)}

    # guesses, inputs and x0-hat
    usual = np.bincount(y[train]).argmax()
    better = (y[test] == usual).mean() > 1 / described["classes"]
    out["chance"] = np.asarray((y[test] == usual).mean() if better else 1 / described["classes"])
    read_, trusted = np.empty((steps, len(INPUTS) + 1, test.sum()), dtype=bool), np.empty((steps, len(INPUTS) + 1))
    for step in range(steps):
        for i, name in enumerate((*INPUTS, "x0_latent")):
            ways = forms(data, name, step, everything, train, shared)
            both = train | validation
            found = {
                w: cross_validated(rows[both], y[both], data["key"][both], penalties, seed) for w, rows in ways.items()
            }
            best = max(found, key=lambda way: found[way])  # the first of equals
            trusted[step, i] = found[best]
            read_[step, i] = (chosen(ways[best], y, train, validation, penalties) == y)[test]
    for i, name in enumerate((*INPUTS, "x0_latent")):
        out[f"accuracy of {name}"], out[f"cross-validation of {name}"] = read_[:, i].mean(axis=1), trusted[:, i]
    first = trusted[:, :-1].argmax(axis=1)
    out["reference"] = np.maximum(read_[np.arange(steps), first].mean(axis=1), out["chance"])
    out["skill"] = (out["accuracy"] - out["reference"][:, None]) / (1 - out["reference"][:, None])
    out["skill"][out["reference"] > 0.95] = np.nan

    # intervals and significance
    n = len(np.unique(data["key"][test]))
    assert n == test.sum(), "one noise seed per problem is assumed here"
    hits = right.sum(axis=-1)
    out["lower"] = np.where(hits > 0, beta.ppf(LEVEL, np.maximum(hits, 1), n - hits + 1), 0.0)
    out["upper"] = np.where(hits < n, beta.ppf(1 - LEVEL, hits + 1, np.maximum(n - hits, 1)), 1.0)
    out["p_permutation"] = by_permutation(said[..., test], y[test])
    out["p_inputs"] = weakest(right, read_[:, :-1])
    out["p_evidence"] = np.maximum(out["p_permutation"], out["p_inputs"])
    if better:
        frequent = np.broadcast_to(y[test] == usual, (steps, 1, n))
        out["p_evidence"] = np.maximum(out["p_evidence"], weakest(right, frequent))
    scored = data["x0_scores"][test][:, notes["steps"]]  # sample, step, candidate; NaN at steps that were not decoded
    decoded = [s for s in range(steps) if not np.isnan(scored[:, s]).any()]
    parsed = {s: np.argmax(scored[:, s], axis=1) == y[test] for s in decoded}
    before = [max((d for d in decoded if d <= s), default=decoded[0]) for s in range(steps)]
    after = [min((d for d in decoded if d >= s), default=decoded[-1]) for s in range(steps)]
    of_x0 = np.stack([[parsed[before[s]], parsed[after[s]], read_[s, -1]] for s in range(steps)])
    out["p_x0"] = weakest(right, of_x0)
    return out


def compare(folder: Path, target: str) -> dict[str, float]:
    """Of every number the largest distance to the grid; of p in standard errors of the draws of both."""
    plane = xr.load_dataset(folder / "report" / "grid.nc").sel(target=target).isel(position=0)
    plane = plane.transpose("step", "layer", ...)
    distances = {}
    for name, value in derive(folder, target).items():
        kind, _, source = name.partition(" of ")
        table = {"accuracy": "baseline_accuracy", "cross-validation": "baseline_cross_validation"}
        theirs = (plane[table[kind]].sel(baseline=source) if source else plane[name]).values
        both = (value + theirs) / 2
        scale = np.sqrt(np.clip(both * (1 - both), 1 / DRAWS, 1) * (1 / DRAWS + 1 / 1000)) if name[:2] == "p_" else 1
        assert (np.isnan(value) == np.isnan(theirs)).all(), name
        distances[name] = float(np.nanmax(np.abs(value - theirs) / scale, initial=0.0))
    return distances


if __name__ == "__main__":
    for name, distance in compare(Path(sys.argv[1]), sys.argv[2]).items():
        sys.stdout.write(f"{name:32} {distance:.4f}{' standard errors' if name.startswith('p_') else ''}\n")
