"""Claims about the clearest of several paired differences: false verdicts, and the bound of the one that is shown."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cosprobe.evaluation import FAILS, HOLDS, clearest, clearest_either_way
from validity.rows import Row, alarms, coverage

# by name: share right at the run's own setting, and at the others
WORLDS = {
    "all right on 0.9": (0.9, (0.9, 0.9, 0.9)),
    "all right on 0.5": (0.5, (0.5, 0.5, 0.5)),
    "one setting": (0.8, (0.8,)),
    "unequal": (0.9, (0.9, 0.8, 0.6)),
}
SHARED = 0.5  # probability that the difficulty of a problem decides, at all settings alike


def simulate(runs: int, seed: int, problems: Sequence[int] = (16, 32, 96)) -> list[Row]:
    """Shares of right answers at several settings, on the same problems; the claim is that some setting is worse."""
    found = []
    for count in problems:
        rng, keys = np.random.default_rng([seed, count]), np.arange(count)
        for name, (own, others) in WORLDS.items():
            truth = own - np.array(others)
            right, wrong, held, widths = (np.empty(runs) for _ in range(4))
            for run in range(runs):
                luck = rng.random((1 + len(others), count))
                luck = np.where(rng.random(luck.shape) < SHARED, rng.random(count), luck)
                correct = (luck < np.array([own, *others])[:, None]).astype(float)
                difference = correct[:1] - correct[1:]
                best, verdict = clearest(difference, keys), clearest_either_way(difference, keys)[1]
                right[run], wrong[run] = verdict == HOLDS, verdict == FAILS
                held[run], widths[run] = best.lower <= truth[best.at], best.value - best.lower
            setting = f"{count} problems, {name}"
            found.append(coverage("lower bounds of the clearest difference", setting, held > 0, widths))
            if not truth.any():
                found.append(alarms("claims about the clearest difference", f"{setting}, holds", right > 0))
            found.append(alarms("claims about the clearest difference", f"{setting}, does not hold", wrong > 0))
    return found
