"""Training curves: the median, the quartiles and the best of all cells, by epoch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from jaxtyping import Float
from lightning.pytorch.loggers import Logger
from torch import Tensor

from cosprobe.monitoring import log
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
    have no curves. The state has the values of all cells so far, by epoch and tag; points that are complete when it is
    loaded are logged again, because a run deletes the TensorBoard files of an earlier attempt.
    """

    def __init__(self, logger: Callable[[str], Logger], cells: int):
        """logger: makes the logger of a statistic. cells: number of cells of all chunks."""
        self.loggers = {name: logger(name) for name in STATISTICS}
        self.cells = cells
        self.values: dict[tuple[int, str], Float[Tensor, " cell"]] = {}

    def state_dict(self) -> dict[str, Any]:
        return {f"{epoch} {tag}": values for (epoch, tag), values in self.values.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, values in state.items():
            number, tag = name.split(" ", 1)
            self.values[int(number), tag] = values
        for epoch in sorted({epoch for epoch, _ in self.values}):
            self._draw(epoch, [tag for of, tag in self.values if of == epoch])

    def on_train_epoch_end(self, trainer: L.Trainer, module: Any) -> None:
        if module.measured:
            self._log(module, "train")

    def on_validation_epoch_end(self, trainer: L.Trainer, module: Any) -> None:
        self._log(module, "validation")

    def _log(self, module: Any, split: str) -> None:
        """Passes all values to a logger in one call: separate calls of `self.log` take longer than an epoch."""
        epoch, tags = module.current_epoch + 1, []
        for target in module.targets:
            metric = module.metrics[f"{split}/{target.name}"]
            accuracy, loss = (score.view(-1, len(module.penalties)) for score in metric.compute())  # may be squeezed
            metric.reset()
            if target.role == RELABELLED:
                continue
            for group, values in ((ACCURACY, accuracy.amax(dim=1)), (LOSS, loss.amin(dim=1))):
                tags.append(f"{group}/{target.name}, {split}")
                before = self.values.get((epoch, tags[-1]), values.new_empty(0).cpu())
                self.values[epoch, tags[-1]] = torch.cat([before, values.cpu()])
        self._draw(epoch, tags)

    def _draw(self, epoch: int, tags: Sequence[str]) -> None:
        """Logs the points of an epoch that have the values of all cells."""
        points = {}
        for tag in tags:
            if len(values := self.values[epoch, tag]) == self.cells:
                points[tag] = statistics(values, torch.max if tag.startswith(ACCURACY) else torch.min)
        for name, logger in self.loggers.items() if points else ():
            log(logger, {tag: values[name] for tag, values in points.items()}, epoch)


def statistics(values: Float[Tensor, " cell"], best: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """Best value, quartiles and median of all cells."""
    quartiles = torch.quantile(values, torch.tensor([0.25, 0.5, 0.75], dtype=values.dtype))
    return dict(zip(STATISTICS, [float(best(values)), *quartiles.tolist()], strict=True))
