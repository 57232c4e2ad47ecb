"""Predictions of a bank and of inputs on a world whose accuracies are known."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

from cosprobe.cells import X0, Cell
from cosprobe.evaluation.baselines import MUST_BEAT
from cosprobe.evaluation.predictions import Evaluated, InputReading, SplitPredictions, TargetPredictions
from cosprobe.tasks import Target

ANSWER = Target("answer", 4, "candidate", "answer", ("one_exit",))
MODEL_ANSWER = Target("model_answer", 4, "candidate", "model_answer", ("choice",))
START = Target("start", 9, "problem", "perception", ("one_exit", "choice"))
DOORS = Target("corridors", 2, "region", "perception", ("one_exit", "choice"))
CONTROL = Target("control", 4, "candidate", "control", ("one_exit", "choice"))
ORIGIN = Target("origin", 4, "problem", "memory", ("one_exit",))
READ = ("noise", "difficulty", "embed", "x_t", X0)  # what the synthetic world has readings of


def truth(target: str, source: int | str, step: int, layers: int, steps: int) -> float:
    """Share of samples that a layer (by its number) or a baseline gets right in the synthetic world: the answer is
    computed in the middle layers of the first step, the model settles on its own along steps, inputs and x0-hat
    follow."""
    time = step / max(1, steps - 1)
    if target == "control":
        return 0.25
    if target in ("start", "corridors"):
        return 0.95 - 0.4 * int(source) / layers
    final, first = (0.93, 0.36) if target != "model_answer" else (0.97, 0.34)
    if source in ("noise", "difficulty"):
        return 0.27
    if source in ("embed", "x_t"):
        return first - 0.06 * (source == "x_t") + 0.7 * (final - first) * time**2
    if source in ("x0_latent", "x0_parsed"):
        lead = 0.72 if target != "model_answer" else 0.5
        return lead + (final - lead) * min(1.0, 1.6 * time)
    depth = int(source) / (layers - 1)
    settled = 1 / (1 + np.exp(-14 * (depth - (0.62 if target != "model_answer" else 0.5) + 0.9 * time)))
    ceiling = final if target != "model_answer" else 0.55 + 0.42 * (1 - np.exp(-6 * time))
    return first + (ceiling - first) * settled


def reading(
    validation: np.ndarray, test: np.ndarray, accuracy: float | np.ndarray, form: str = "region, mean", columns: int = 8
) -> InputReading:
    """Of labels [step, position, *label]; accuracy in cross-validation of every step and position."""
    shape = validation.shape[:2]
    sizes = np.full(shape, columns)
    cross = np.broadcast_to(np.asarray(accuracy, dtype=float), shape)
    return InputReading(np.full(shape, form), cross, np.ones(shape), sizes, np.minimum(sizes, 40), validation, test)


def synthetic(
    layers=8,
    steps=20,
    samples=196,
    positions=("all",),
    branches=("cond",),
    targets=(ANSWER, MODEL_ANSWER),
    seeds=1,
    seed=0,
) -> Evaluated:
    """Predictions of a bank and of inputs on a world whose accuracies are `truth`, errors correlated between cells."""
    rng = np.random.default_rng(seed)
    cells = tuple(Cell(t, n, b, p) for t in range(steps) for n in range(layers) for b in branches for p in positions)
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
        shares = [truth(target.name, c.layer, c.step, layers, steps) * (0.6 if c.position == "0" else 1) for c in cells]
        named = [name for name in READ if name in (*MUST_BEAT.get(target.role, ()), X0) and target.role in MUST_BEAT]
        apart = len(positions) if target.role == "memory" else 1  # everything else is read wherever it serves best
        shares += [truth(target.name, name, t, layers, steps) for name in named for t in range(steps * apart)
                   for t in [t // apart]]  # fmt: skip
        said = guesses(target, labels, shares)
        predicted, others = said[: len(cells)], said[len(cells) :].reshape(len(named), steps, apart, *labels.shape)
        whole = (steps, len(positions), *labels.shape)
        inputs = {name: np.broadcast_to(values, whole) for name, values in zip(named, others, strict=True)}
        if target.role == "control":
            predicted = rng.integers(target.classes, size=predicted.shape)
        if target.role not in ("answer", "model_answer"):
            return SplitPredictions(labels, keys, predicted, inputs=inputs)
        shares = [truth(target.name, "x0_parsed", t, layers, steps) for t in range(steps)]
        x0_parsed = np.where(np.isin(np.arange(steps), list(decoded))[:, None], guesses(target, labels, shares), -1)
        model_answer = labels if target.role == "model_answer" else guesses(target, labels, [0.9])[0]
        return SplitPredictions(labels, keys, predicted, x0_parsed, model_answer, inputs)

    def result(target: Target) -> TargetPredictions:
        train = rng.integers(target.classes, size=(300, 4) if target.form == "region" else 300)
        validation, test = split(target, samples, "v"), split(target, samples, "t")
        readings = {}
        for name, said in test.inputs.items():
            cross = [truth(target.name, name, t, layers, steps) + rng.normal(scale=0.02) for t in range(steps)]
            accuracy = np.repeat(np.clip(cross, 0, 1)[:, None], len(positions), axis=1)
            readings[name] = reading(validation.inputs[name], said, accuracy)
        none = 7 * (target.role == "model_answer")
        return TargetPredictions(
            target, train, np.arange(300) // 2, validation, test, np.full(len(cells), 0.01), none, readings=readings
        )

    return Evaluated(
        cells,
        tuple("high" if t < steps // 2 else "low" for t in range(steps)) if steps > 30 else ("transformer",) * steps,
        tuple(result(target) for target in targets),
    )
