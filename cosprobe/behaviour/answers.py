"""What probes read and what x0-hat shows along the denoising steps, for one kind of problems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from cosprobe.activations import ProbeSamples
from cosprobe.cells import Cell
from cosprobe.ensembles import ProbeScorer
from cosprobe.evaluation import Grid
from cosprobe.probes import ProbeBank
from cosprobe.tasks import ANSWER_ROLES, Role

NONE = -1  # no answer
DRAWN = 0.5  # a candidate is drawn from half of the way between absent and drawn on
MOST_SEVERAL = 0.1  # share of finished videos in which several candidates may count as drawn


@dataclass(frozen=True, eq=False)
class Answers:
    """Test samples of one kind along the denoising steps.

    target: the target whose probes are read. cells: one for each step with probes, the one with the best validation
    accuracy. proba: probabilities of the probes. decoded: step indices at which x0-hat was decoded.
    drawn: how much of each candidate x0-hat shows: 0 as much as finished videos show of a candidate that is not their
    answer, 1 as much as they show of their answer (medians over validation). The last row is the finished video. None
    without a parser, if no x0-hat was decoded, or where the scores of the parser do not tell the two apart.
    shown: the answer that the parser reads at the same rows, NONE for none or several; None without a parser.
    total: number of steps of a run. right: the right answers; None where several may be right. keys: the problem of
    each sample. difficulty: named whole numbers of each sample.
    """

    kind: str
    target: str
    cells: tuple[Cell, ...]
    proba: Float[np.ndarray, "sample step candidate"]
    decoded: tuple[int, ...]
    drawn: Float[np.ndarray, "sample row candidate"] | None
    shown: Int[np.ndarray, "sample row"] | None
    total: int
    right: Int[np.ndarray, " sample"] | None
    keys: Shaped[np.ndarray, " sample"]
    difficulty: dict[str, Int[np.ndarray, " sample"]]

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def steps(self) -> tuple[int, ...]:
        """Step indices with probes."""
        return tuple(cell.step for cell in self.cells)


def answers(samples: ProbeSamples, bank: ProbeBank, grid: Grid) -> list[Answers]:
    """One entry for each kind of problems with an answer or model_answer that probes were trained on.

    samples: of all splits; the test samples are read, validation gives the scale of `drawn`.
    """
    if not any(target.role in ANSWER_ROLES and target.name in grid.targets for target in bank.targets):
        return []
    scorer, found = ProbeScorer.of(bank, grid, str(grid.provenance.get("task", ""))), []
    for kind in dict.fromkeys(samples.kinds.tolist()):
        known = [target for target in bank.targets if kind in target.kinds and target.name in grid.targets]
        of_kind = [target for role in ANSWER_ROLES for target in known if target.role is role]
        if not of_kind:
            continue
        target = of_kind[0]
        test = samples.rows(np.flatnonzero((samples.split == "test") & (samples.kinds == kind)))
        if not len(test):
            continue
        steps = sorted({cell.step for cell in scorer.accuracy[target.name]})
        cells = tuple(scorer.cell(target.name, step) for step in steps)
        at = [bank.cells.index(cell) for cell in cells]
        proba = bank.probabilities(test.features[:, at], target.name, cells).transpose(0, 1).numpy()
        decoded = _decoded(test)
        label = test.labels[target.name].numpy()
        found.append(
            Answers(
                kind,
                target.name,
                cells,
                proba,
                decoded,
                _drawn(samples, test, kind, decoded) if decoded else None,
                _shown(test, decoded) if decoded else None,
                test.scores["x0_scores"].shape[1] if "x0_scores" in test.scores else cells[-1].step + 1,
                label if target.role is Role.ANSWER and (label >= 0).all() else None,
                test.keys,
                {name: values for name, values in test.difficulty.items() if len(np.unique(values)) > 1},
            )
        )
    return found


def _decoded(test: ProbeSamples) -> tuple[int, ...]:
    """Step indices of decoded x0-hats but the last, which is the finished video; none without a parser."""
    if "x0_scores" not in test.scores or not test.scores["final"].shape[1]:
        return ()
    missing = np.isnan(test.scores["x0_scores"]).any(axis=(0, 2))
    return tuple(int(step) for step in np.flatnonzero(~missing[:-1]))


def _drawn(
    samples: ProbeSamples, test: ProbeSamples, kind: str, decoded: Sequence[int]
) -> Float[np.ndarray, "sample row candidate"] | None:
    """`Answers.drawn`. None, too, where the scores of finished validation videos do not tell their answer from other
    candidates: where several count as drawn in more than MOST_SEVERAL of them."""
    known = samples.scores["final"][(samples.split == "validation") & (samples.kinds == kind)]
    if not len(known):
        return None
    ordered = np.sort(known, axis=1)
    absent, present = np.median(ordered[:, :-1]), np.median(ordered[:, -1])
    if present - absent <= 1e-6:
        return None
    if several_drawn(((known - absent) / (present - absent))[:, None], DRAWN).mean() > MOST_SEVERAL:
        return None
    rows = np.concatenate([test.scores["x0_scores"][:, list(decoded)], test.scores["final"][:, None]], axis=1)
    return (rows - absent) / (present - absent)


def _shown(test: ProbeSamples, decoded: Sequence[int]) -> Int[np.ndarray, "sample row"]:
    """`Answers.shown`."""
    assert test.model_answer is not None  # samples with scores have one
    rows = test.scores["x0_answer"][:, list(decoded)]
    return np.concatenate([rows, test.model_answer[:, None]], axis=1)


def settled(picks: Int[np.ndarray, "sample row"]) -> Int[np.ndarray, " sample"]:
    """The first row from which on all picks of a sample are its last one."""
    same = picks == picks[:, -1:]
    return np.flip(np.cumprod(np.flip(same, axis=1), axis=1), axis=1).argmax(axis=1)


def several_drawn(drawn: Float[np.ndarray, "sample row candidate"], least: float) -> Bool[np.ndarray, "sample row"]:
    """Whether two candidates or more are drawn at least this much."""
    return (drawn >= least).sum(axis=-1) >= 2
