"""Training curves: the median, the quartiles and the best of all cells, by epoch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from jaxtyping import Float
from lightning.pytorch.loggers import Logger
from torch import Tensor

from cosprobe.tasks import RELABELLED

ACCURACY, LOSS = "training accuracy by epoch", "training loss by epoch"  # groups of the tags
STATISTICS = ("best cell", "lower quartile", "median", "upper quartile")


class TrainingCurves(L.Callback):
    """Logs accuracy and mean cross-entropy of the probes of `ProbeTraining` by epoch, for each target and split.

    A cell counts with the penalty of its highest accuracy, or of its lowest cross-entropy. There are thousands of
    cells, too many for a curve each: the curves are statistics over cells. Each statistic has a logger of its own with
    the same tags, such as `training accuracy by epoch/answer, validation`. TensorBoard then draws all statistics in one
    chart. The best cell has the highest accuracy or the lowest cross-entropy.
    With several chunks of cells, a point is logged by the last chunk, for the cells of all chunks. Relabelled controls
    have no curves.
    """

    def __init__(self, logger: Callable[[str], Logger], chunks: int):
        """logger: makes the logger of a statistic. chunks: number of times that `Trainer.fit` will be called."""
        self.loggers = {name: logger(name) for name in STATISTICS}
        self.chunks = chunks
        self.values: dict[tuple[int, str], list[Tensor]] = defaultdict(list)

    def on_train_epoch_end(self, trainer: L.Trainer, module: Any) -> None:
        if module.measured:
            self._log(module, "train")

    def on_validation_epoch_end(self, trainer: L.Trainer, module: Any) -> None:
        self._log(module, "validation")

    def _log(self, module: Any, split: str) -> None:
        """Passes all values to a logger in one call: separate calls of `self.log` take longer than an epoch."""
        epoch, points = module.current_epoch + 1, {}
        for target in module.targets:
            metric = module.metrics[f"{split}/{target.name}"]
            accuracy, loss = (score.view(-1, len(module.penalties)) for score in metric.compute())  # may be squeezed
            metric.reset()
            if target.role == RELABELLED:
                continue
            for group, values in ((ACCURACY, accuracy.amax(dim=1)), (LOSS, loss.amin(dim=1))):
                tag = f"{group}/{target.name}, {split}"
                chunks = self.values[epoch, tag]
                chunks.append(values.cpu())
                if len(chunks) == self.chunks:
                    best = torch.max if group == ACCURACY else torch.min
                    points[tag] = statistics(torch.cat(self.values.pop((epoch, tag))), best)
        for name, logger in self.loggers.items() if points else ():
            logger.log_metrics({tag: values[name] for tag, values in points.items()}, step=epoch)
            logger.save()


def statistics(values: Float[Tensor, " cell"], best: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """Best value, quartiles and median of all cells."""
    quartiles = torch.quantile(values, torch.tensor([0.25, 0.5, 0.75], dtype=values.dtype))
    return dict(zip(STATISTICS, [float(best(values)), *quartiles.tolist()], strict=True))
