"""When, along steps and along layers, a target becomes decodable, and how long before the picture shows it."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from cosprobe.evaluation.latency import lag, latency

STEP = ("step", "branch", "place")


def timing(
    right: Float[np.ndarray, "row sample"],
    keys: Shaped[np.ndarray, "sample"],
    layer: Int[np.ndarray, "step layer branch place"],
    visible: Int[np.ndarray, "step branch place"],
    found: Bool[np.ndarray, "step layer branch place"],
    guess: Float[np.ndarray, "sample"],
    steps: list[int],
    layers: list[int],
    draws: int,
    seed: int,
) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """Latency of every layer over steps and of the visible baseline, their lag, and depth of every step over layers:
    each variable with its axes.

    right: right or wrong of every row; layer, visible: the rows of cells and of the visible baseline, -1 for none.
    found: cells with evidence; a line without any has no latency. guess: right or wrong of the guess, per sample.
    """
    across = layer.shape[2:]
    lines = np.concatenate([layer, visible[:, None]], axis=1).reshape(len(steps), -1)  # step, (layer or visible ...)
    shown = np.asarray(found.any(axis=(0, 1)))[None]  # where no probe finds anything, timing says nothing
    evidence = np.concatenate([found.any(axis=0), shown]).ravel()
    early = latency(_points(right, lines.T), np.tile(guess, (lines.shape[1], 1)), steps, keys, evidence, draws, seed)
    count = len(layers) * int(np.prod(across))
    behind = count + np.arange(count) % max(1, int(np.prod(across)))
    lead = lag(early, behind.tolist(), list(range(count)))
    deep_lines = np.moveaxis(layer, 1, -1).reshape(-1, len(layers))
    deep = latency(
        _points(right, deep_lines), np.tile(guess, (len(deep_lines), 1)), layers, keys,
        found.any(axis=1).ravel(), draws, seed,
    )  # fmt: skip
    by_layer = ("layer", "branch", "place")
    shape, flat = (len(layers), *across), by_layer[1:]
    table = {
        "latency": (by_layer, early.value[:count].reshape(shape)),
        "latency_lower": (by_layer, early.lower[:count].reshape(shape)),
        "latency_upper": (by_layer, early.upper[:count].reshape(shape)),
        "latency_at_most": (by_layer, early.censored[:count].reshape(shape)),
        "visible_latency": (flat, early.value[count:].reshape(across)),
        "visible_latency_lower": (flat, early.lower[count:].reshape(across)),
        "visible_latency_upper": (flat, early.upper[count:].reshape(across)),
        "visible_latency_at_most": (flat, early.censored[count:].reshape(across)),
        "lag": (by_layer, lead.value.reshape(shape)),
        "lag_lower": (by_layer, lead.lower.reshape(shape)),
        "lag_upper": (by_layer, lead.upper.reshape(shape)),
    }
    for name, values in (("depth", deep.value), ("depth_lower", deep.lower), ("depth_upper", deep.upper)):
        table[name] = (STEP, values.reshape(len(steps), *across))
    return table


def _points(
    right: Float[np.ndarray, "row sample"], index: Int[np.ndarray, "line point"]
) -> Float[np.ndarray, "line point sample"]:
    return np.where((index >= 0)[..., None], right[index], np.nan)
