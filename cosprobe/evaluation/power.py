"""What a number of test problems can show: the smallest accuracy that a map would find."""

from __future__ import annotations

import math

from scipy.special import betainc, betaincinv

from cosprobe.errors import InputError
from cosprobe.evaluation.variables import ALPHA

POWER = 0.8  # chance that a cell of the accuracy that is found is significant


def detectable_accuracy(problems: int, chance: float, cells: int, power: float = POWER) -> float | None:
    """The smallest accuracy at which a cell is significant with probability `power`, in a map of `cells` cells.

    problems: number of independent test problems, one sample each. chance: accuracy of the best guess, between 0 and 1.
    Significant means a binomial p of at most 0.05 / cells (Bonferroni). The tests of a map are corrected by the largest
    statistic over cells instead, which needs less where cells agree, so the accuracy is an upper bound. That a cell is
    also above every input is a further claim, which needs more.
    None where even an accuracy of 1 would not be significant. Raises InputError for arguments out of range.
    """
    if problems < 1 or cells < 1 or not 0 < chance < 1 or not 0 < power < 1:
        raise InputError(
            f"problems={problems}, cells={cells}, chance={chance:g}, power={power:g}: expected at least 1 problem and "
            "1 cell, and chance and power between 0 and 1"
        )
    # P(at least `hits` of n right at accuracy a) is the regularised incomplete beta function I_a(hits, n - hits + 1)
    hits = math.ceil(problems * chance)  # at least 1; fewer than this are expected by chance
    while hits <= problems and betainc(hits, problems - hits + 1, chance) > ALPHA / cells:
        hits += 1
    if hits > problems:
        return None
    return float(betaincinv(hits, problems - hits + 1, power))
