"""Ranks, for Spearman's correlation. (scipy.stats is slow to import.)"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def average_ranks(values: Float[np.ndarray, "row column"]) -> Float[np.ndarray, "row column"]:
    """Ranks along the first axis, from 1; equal values share the mean of their ranks."""
    below = np.stack([(values < row).sum(axis=0) for row in values])
    equal = np.stack([(values == row).sum(axis=0) for row in values])
    return below + (equal + 1) / 2
