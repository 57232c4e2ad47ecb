"""Fitting every probe of a grid at once.

`logistic`: one LightningModule holds all cells, targets and penalties. Its loss is a sum of separate problems,
each a convex one, so the result is what separate fits would give. Newton steps finish what training leaves short of
its optimum, and every fit ends with a certificate. `newton`: the same by second-order steps alone, to fp64.
`ridge`: closed form.

Penalty: mean cross-entropy + lambda / 2 * |w|^2 over the n rows that carry the target, intercept free. This is
scikit-learn's `LogisticRegression` with C = 1 / (n lambda); for two classes, where scikit-learn keeps one vector
instead of two opposite ones, C = 2 / (n lambda). For ridge, alpha = lambda * n: one list of lambdas serves all kinds.

Optimiser: Nesterov descent along the principal axes of the features, each scaled by an upper bound of the curvature on
it (Boehning 1992, "Multinomial logistic regression algorithm"): nothing to tune. Where a penalty is weak and a cell
nearly separable, the last bit of the way takes it longer than Newton steps, so 10 epochs and the finish need less time
than 60 and the finish, to the same certificate.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torchmetrics
from jaxtyping import Float, Int
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from cosprobe.activations import CaptureConfig, ProbeSamples
from cosprobe.errors import InputError
from cosprobe.probes.bank import ProbeBank
from cosprobe.probes.datamodule import ProbeBatch, ProbeData, check_targets, shared
from cosprobe.probes.linalg import (
    Chosen,
    Fitted,
    affine,
    classes_last,
    curvature,
    row_sums,
    spread,
    standardise,
    validated,
)
from cosprobe.probes.newton import Certificate, finished, newton_targets, shortfall
from cosprobe.probes.ridge import fit_ridge
from cosprobe.runtime import TrainerConfig, backend, enough_memory
from cosprobe.tasks import Target, readable_targets

KINDS = ("logistic", "newton", "ridge")
MOMENTUM = 0.9
FLAT = 0.7  # share of the steps at the full rate, which then falls to zero in a line
VALIDATIONS = 20  # points on the curves


@dataclass
class ProbeConfig(CaptureConfig):
    """What is captured, and the recipe of the probes.

    kind: `logistic`, `newton` (the same probes) or `ridge`. lambdas: penalties to try, on standardised features; one is
    chosen per target and cell, by validation or, for `ridge`, by folds of whole problems inside train.
    epochs, lr, batch: of `logistic`, before Newton steps finish it; lr is a share of the largest safe step, and a batch
    as large as the training set takes the best steps (smaller ones only save memory). memory: GB that the features of
    the cells fitted together may take, with their copies and optimiser state.
    """

    kind: str = "logistic"
    lambdas: list[float] = field(default_factory=lambda: [0.01, 0.1, 1.0])
    epochs: int = 10
    lr: float = 1.0
    batch: int = 4096
    memory: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in KINDS:
            raise InputError(f"probe.kind={self.kind!r}: expected one of {', '.join(KINDS)}")
        if not self.lambdas or min(self.lambdas) <= 0:
            raise InputError(f"probe.lambdas={list(self.lambdas)}: expected one or more penalties above 0")
        if self.epochs < 1:
            raise InputError(f"probe.epochs={self.epochs}: expected at least 1")
        if not 0 < self.lr <= 1:
            raise InputError(f"probe.lr={self.lr}: expected a share of the largest safe step, above 0 and up to 1")
        if self.batch < 1:
            raise InputError(f"probe.batch={self.batch}: expected at least 1 sample")
        if self.memory <= 0:
            raise InputError(f"probe.memory={self.memory}: expected GB above 0")


class CellScores(torchmetrics.Metric):
    """Accuracy and mean cross-entropy of every cell and penalty; rows without a label do not count."""

    full_state_update = False

    def __init__(self, cells: int, settings: int):
        super().__init__()
        self.add_state("correct", torch.zeros(cells, settings), dist_reduce_fx="sum")
        self.add_state("loss", torch.zeros(cells, settings), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")

    def update(
        self,
        loss: Float[Tensor, "cell setting"],
        correct: Float[Tensor, "cell setting"],
        count: Int[Tensor, ""],
    ) -> None:
        """Sums over rows, as `row_sums` gives them."""
        self.loss += loss.detach()
        self.correct += correct
        self.count += count

    def compute(self) -> tuple[Float[Tensor, "cell setting"], Float[Tensor, "cell setting"]]:
        return self.correct / self.count.clamp(min=1), self.loss / self.count.clamp(min=1)


class ProbeTraining(L.LightningModule):
    """Every cell, target and penalty of a logistic bank. Once trained, `fitted` holds the probes and `certificates` how
    each fit ended; curves show the training alone.

    The loss is a sum over all of them, so each ends where it would alone; nothing here may couple them (no gradient
    clipping by norm, no early stopping). Parameters are made from the data module in `setup`: per form [cell, axis,
    lambda, out], in principal axes, with the outputs of all targets of that form side by side.
    """

    def __init__(self, config: ProbeConfig):
        super().__init__()
        self.config = config

    def setup(self, stage: str) -> None:
        data: ProbeData = self.trainer.datamodule
        train = data.whole["train"]
        steeper = train.size / min(train.size, data.batch)  # a small batch may be that much steeper than the whole
        settings = len(self.config.lambdas)
        self.targets = data.targets
        self.penalties = torch.tensor(self.config.lambdas, device=data.mean.device)[:, None]
        self.weights, self.biases = torch.nn.ParameterDict(), torch.nn.ParameterDict()
        self.weight_bounds: dict[str, Float[Tensor, "cell axis setting out"]] = {}
        self.bias_bounds: dict[str, Float[Tensor, " out"]] = {}
        self.columns: dict[str, slice] = {}
        self.labelled: dict[str, float] = {}  # rows with a label, per sample
        self.metrics = torch.nn.ModuleDict()
        for form in data.forms:
            cells, _, regions, axis = train.rows[form].shape
            steep: list[float] = []
            for target in (t for t in data.targets if t.form == form):
                labels = train.labels[target.name]
                self.labelled[target.name] = int((labels >= 0).sum()) / train.size
                rarer = labels[0].numel() / self.labelled[target.name]
                out = 1 if form == "candidate" else target.classes
                self.columns[target.name] = slice(len(steep), len(steep) + out)
                steep += [curvature(form, regions) * rarer * steeper] * out
                for split in ("train", "validation"):
                    self.metrics[f"{split}/{target.name}"] = CellScores(cells, settings)
            bound = torch.tensor(steep, device=data.mean.device)
            self.weight_bounds[form] = data.axes[form].variance[:, :, None, None] * bound + self.penalties
            self.weights[form] = torch.nn.Parameter(torch.zeros(cells, axis, settings, len(steep)))
            if form != "candidate":  # the same bias for every candidate would change nothing
                self.bias_bounds[form] = bound
                self.biases[form] = torch.nn.Parameter(torch.zeros(cells, settings, len(steep)))

    def forward(self, rows: dict[str, Float[Tensor, "cell sample row axis"]]) -> dict[str, Tensor]:
        """Decision values of every target, classes last, penalties before them."""
        values = {f: affine(rows[f], weight, self.biases.get(f, None)) for f, weight in self.weights.items()}
        return {t.name: classes_last(values[t.form][..., self.columns[t.name]], t.form) for t in self.targets}

    def training_step(self, batch: ProbeBatch, index: int) -> Tensor:
        total = torch.zeros((), device=self.device)
        for name, values in self(batch.rows).items():
            loss, correct, count = row_sums(values, batch.labels[name])
            if self._measured():
                self.metrics[f"train/{name}"].update(loss, correct, count)
            # Divided by the labels a batch of this size carries on average, not by those it happens to carry:
            # that is unbiased, and the mean over processes of these gradients is the gradient of one process.
            total = total + loss.sum() * (self.trainer.world_size / (batch.size * self.labelled[name]))
        for weight in self.weights.values():
            total = total + (self.penalties * weight.square()).sum() / 2
        return total

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for form, weight in self.weights.items():
            weight.grad /= self.weight_bounds[form]
        for form, bias in self.biases.items():
            bias.grad /= self.bias_bounds[form]

    def validation_step(self, batch: ProbeBatch, index: int) -> None:
        for name, values in self(batch.rows).items():
            self.metrics[f"validation/{name}"].update(*row_sums(values, batch.labels[name]))

    def _measured(self) -> bool:  # at points of curves only
        return (self.current_epoch + 1) % self.trainer.check_val_every_n_epoch == 0

    def on_train_epoch_end(self) -> None:
        if self._measured():
            self._log("train")

    def on_validation_epoch_end(self) -> None:
        self._log("validation")

    def _log(self, split: str) -> None:
        """Few curves: a grid has thousands of cells, and a tag for each of them would drown TensorBoard.

        Written to the logger at once, as `self.log` one by one takes longer than an epoch does.
        """
        curves = {}
        for target in self.targets:
            scores = self.metrics[f"{split}/{target.name}"].compute()
            accuracy, loss = (score.view(-1, len(self.penalties)) for score in scores)  # a single number comes squeezed
            self.metrics[f"{split}/{target.name}"].reset()
            best = accuracy.amax(dim=1)
            curves[f"accuracy/{target.name}/{split}_best"] = float(best.max())
            curves[f"accuracy/{target.name}/{split}_mean"] = float(best.mean())
            curves[f"loss/{target.name}/{split}"] = float(loss.amin(dim=1).mean())
        self.logger.log_metrics(curves, step=self.global_step)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.config.lr, momentum=MOMENTUM, nesterov=True)
        steps = self.trainer.estimated_stepping_batches
        falling = max(1.0, (1 - FLAT) * steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (steps - step) / falling))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @torch.no_grad()
    def on_train_end(self) -> None:
        """Finishes what training left short of its optimum, and says how every fit ended."""
        data: ProbeData = self.trainer.datamodule
        train = data.samples["train"]
        x = standardise(train.features, data.mean, data.std)
        self.fitted, self.certificates = finished(
            self._trained(data), x, train.labels, self.targets, self.config.lambdas, shared
        )

    def _trained(self, data: ProbeData) -> Fitted:
        """Weights and biases on standardised features, out of the principal axes."""
        result = {}
        for target in self.targets:
            axes, part = data.axes[target.form], self.columns[target.name]
            weight = self.weights[target.form].detach()[..., part].to(axes.basis.device)
            weight = torch.einsum("cwa,caso->cwso", axes.basis, weight)
            bias = weight.new_zeros(weight.shape[0], *weight.shape[2:])
            if target.form in self.biases:
                bias = self.biases[target.form].detach()[..., part].to(weight.device)
                bias = bias - torch.einsum("cw,cwso->cso", axes.mean, weight)
            result[target.name] = (weight, bias)
        return result


class FitProgress(L.Callback):
    """One bar for the whole fit, all chunks of cells included, so that the time left is the time left."""

    def __init__(self, total: int):
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, transient=True)
        self.task = self.progress.add_task("fitting probes, epoch", total=total)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.is_global_zero and self.progress.console.is_terminal:
            self.progress.start()

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.progress.advance(self.task)

    def on_train_end(self, *_: Any) -> None:
        self.progress.stop()

    on_exception = on_train_end


@enough_memory("give probe.memory fewer GB")
def fit(samples: ProbeSamples, config: ProbeConfig, trainer: TrainerConfig, folder: Path, seed: int) -> ProbeBank:
    """Standardises on the training samples, fits every penalty, keeps one per target and cell: for `ridge` the best
    on folds inside train, else the one with the best validation accuracy (ties: the lower cross-entropy there, of the
    weights that are kept).

    Temperatures are fitted on validation. Curves go to TensorBoard files in `folder`. With several devices every
    process calls this and gets the same bank. Cells are fitted in chunks when all together need more than
    `config.memory`, with the same result. The provenance of `logistic` and `newton` has per target how many fits
    `converged`, of how many, and the largest relative `gap`; one printed line names fits that did not converge. Raises
    ValueError when a target cannot be fitted, naming it.
    """
    train, validation = samples.subset("train"), samples.subset("validation")
    targets = readable_targets(samples.targets, samples.regions)
    check_targets(targets, train, validation)
    parts = chunks(samples, targets, config)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # which devices there are was said before
    progress = FitProgress(config.epochs * len(parts))
    banks: list[ProbeBank] = []
    endings: list[dict[str, Certificate]] = []
    for number, part in enumerate(parts):
        runner = _runner(config, trainer, Path(folder) / (f"cells_{number}" if len(parts) > 1 else ""), progress)
        chunk, held_out = train.at(part), validation.at(part)
        if config.kind == "logistic":
            data, module = ProbeData(chunk, held_out, config.batch, seed), ProbeTraining(config)
            runner.fit(module, datamodule=data)
            mean, std, fitted, ended = data.mean, data.std, module.fitted, module.certificates
        else:
            mean, std = (stat.to(runner.strategy.root_device) for stat in spread(chunk.features))
            x = standardise(chunk.features, mean, std)
            if config.kind == "ridge":
                chosen = fit_ridge(x, chunk.labels, chunk.keys, targets, config.lambdas, seed, shared)
            else:
                fitted, ended = newton_targets(x, chunk.labels, targets, config.lambdas, shared)
        if config.kind != "ridge":
            endings.append(ended)
            chosen = _validated(fitted, mean, std, held_out, targets, config.lambdas)
        banks.append(ProbeBank(chunk.cells, tuple(targets), samples.regions, mean.cpu(), std.cpu(), **_tables(chosen)))
    provenance = {"probe": asdict(config), "trainer": asdict(trainer), "seed": seed, "train": len(train)}
    provenance |= {"validation": len(validation)}
    if endings:
        whole = {t.name: Certificate.join([ended[t.name] for ended in endings]) for t in targets}
        if (line := shortfall(config.kind, whole, samples.cells, config.lambdas)) and runner.is_global_zero:
            Console().print(line, markup=False, highlight=False, soft_wrap=True)
        provenance["converged"] = {name: one.tally for name, one in whole.items()}
        provenance["gap"] = {name: float(one.gap.max()) for name, one in whole.items()}
    return ProbeBank.join(banks).calibrated(validation.features, validation.labels).with_provenance(**provenance)


def chunks(samples: ProbeSamples, targets: Sequence[Target], config: ProbeConfig) -> list[slice]:
    """Slices of cells that fit into `config.memory` together; a function of sizes alone, not of the machine."""
    count, cells, regions, channels = samples.features.shape
    numbers = count * regions * channels  # the standardised features, and then each form's coordinates
    for form in {t.form for t in targets}:
        width = regions * channels if form == "problem" else channels
        outs = sum(1 if form == "candidate" else t.classes for t in targets if t.form == form)
        axis = min(width, count * (1 if form == "problem" else regions))
        numbers += 2 * count * regions * channels + width * axis + 4 * axis * outs * len(config.lambdas)
    size = max(1, int(config.memory * 1e9 / (4 * numbers)))
    return [slice(start, min(start + size, cells)) for start in range(0, cells, size)]


def _runner(config: ProbeConfig, trainer: TrainerConfig, folder: Path, progress: L.Callback) -> L.Trainer:
    strategy: Any = "auto"
    if trainer.devices > 1:  # nothing but parameters may be synchronised: the rest is the same everywhere already
        strategy = DDPStrategy(process_group_backend=backend(trainer), broadcast_buffers=False)
    return L.Trainer(
        **asdict(trainer),
        strategy=strategy,
        max_epochs=config.epochs,
        check_val_every_n_epoch=max(1, config.epochs // VALIDATIONS),
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=TensorBoardLogger(folder, name="", version=""),
        callbacks=[progress],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _validated(
    fitted: Fitted,
    mean: Float[Tensor, "cell channel"],
    std: Float[Tensor, "cell channel"],
    validation: ProbeSamples,
    targets: Sequence[Target],
    lambdas: Sequence[float],
) -> dict[str, Chosen]:
    x = standardise(validation.features, mean, std)
    return {t.name: validated(x, validation.labels[t.name], t.form, *fitted[t.name], lambdas) for t in targets}


def _tables(chosen: dict[str, Chosen]) -> dict[str, dict[str, Tensor]]:
    return {f.name: {name: getattr(one, f.name).cpu() for name, one in chosen.items()} for f in fields(Chosen)}
