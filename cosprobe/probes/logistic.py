"""Fits all probes of a grid together.

`logistic`: one LightningModule holds the probes of all cells, targets and penalties. Its loss is the sum of their
convex losses, so the result equals that of separate fits. Newton steps then bring fits that are short of their optimum
there. Every fit has a certificate, a bound of its distance from the optimum. `newton`: the same probes by Newton steps
alone, in fp64. `ridge`: closed form.

Objective: mean cross-entropy + lambda / 2 * |w|^2 over the n rows with a label of the target, intercept not penalised.
This is scikit-learn's `LogisticRegression` with C = 1 / (n lambda). For two classes, where scikit-learn has one weight
vector instead of two opposite ones, C = 2 / (n lambda). For ridge, alpha = lambda * n, so all kinds use one list of
penalties.

Optimiser: gradient descent with Nesterov momentum along the principal axes of the features. The gradient on each axis
is divided by an upper bound of the curvature (Boehning 1992, "Multinomial logistic regression algorithm"), so no
learning rate has to be tuned. With a weak penalty and a nearly separable cell it converges slowly, and Newton steps are
faster. 10 epochs followed by Newton steps take less time than 60 epochs followed by Newton steps, for the same
certificate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torchmetrics
from jaxtyping import Float, Int
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from cosprobe.activations import ProbeSamples
from cosprobe.config import ProbeConfig, TrainerConfig
from cosprobe.monitoring import TRAINING, ResourceMonitor, build_logger
from cosprobe.probes.bank import ProbeBank
from cosprobe.probes.checkpoints import ChecksumIO, EpochCheckpoint, SavedFit, check_state
from cosprobe.probes.curves import TrainingCurves
from cosprobe.probes.datamodule import ProbeBatch, ProbeData, check_targets, shared
from cosprobe.probes.linalg import (
    Chosen,
    Fitted,
    Parts,
    affine,
    classes_last,
    curvature,
    row_sums,
    spread,
    standardise,
    validated,
)
from cosprobe.probes.newton import Certificate, finished, newton_targets, shortfall
from cosprobe.probes.optimizer import PreconditionedNesterov
from cosprobe.probes.ridge import fit_ridge
from cosprobe.runtime import build_trainer, enough_memory, keyboard_interrupts, return_freed_memory
from cosprobe.tasks import Target, readable_targets

MOMENTUM = 0.9
FLAT = 0.7  # share of the steps with the full learning rate; after them it decreases linearly to 0
CHECKPOINTS = "checkpoints"  # the subfolder with the files of a fit that has not finished
DRAWN = "curves/"  # in a saved chunk, begins the names of the values of the training curves
VALIDATIONS = 20  # largest number of validations during training, the points of the TensorBoard curves


class CellScores(torchmetrics.Metric):
    """Accuracy and mean cross-entropy of every cell and penalty, over the rows with a label."""

    full_state_update = False

    def __init__(self, cells: int, penalties: int):
        super().__init__()
        self.add_state("correct", torch.zeros(cells, penalties), dist_reduce_fx="sum")
        self.add_state("loss", torch.zeros(cells, penalties), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")

    def update(
        self,
        loss: Float[Tensor, "cell penalty"],
        correct: Float[Tensor, "cell penalty"],
        count: Int[Tensor, ""],
    ) -> None:
        """Adds sums over rows, as returned by `row_sums`."""
        self.loss += loss.detach()
        self.correct += correct
        self.count += count

    def compute(self) -> tuple[Float[Tensor, "cell penalty"], Float[Tensor, "cell penalty"]]:
        """Accuracy and mean cross-entropy."""
        return self.correct / self.count.clamp(min=1), self.loss / self.count.clamp(min=1)


class ProbeTraining(L.LightningModule):
    """The training of logistic probes of all cells, targets and penalties.

    After training, `fitted` has the probes and `certificates` the certificate of every fit. `TrainingCurves` logs the
    training before the Newton steps.
    The loss is the sum over all fits, so the result of each fit does not depend on the others. Anything that couples
    them (gradient clipping by norm, early stopping) would break this. `setup` creates the parameters from the data
    module: for each form [cell, axis, penalty, out], in principal axes, with the outputs of all targets of the form
    concatenated.
    """

    def __init__(self, config: ProbeConfig):
        super().__init__()
        self.config = config

    def setup(self, stage: str) -> None:
        """Creates parameters, curvature bounds and metrics from the data module of the trainer."""
        data: ProbeData = self.trainer.datamodule
        train = data.whole["train"]
        steeper = train.size / min(train.size, data.batch)  # bound of curvature of a batch / of all samples
        penalties = len(self.config.penalties)
        self.targets = data.targets
        self.penalties = torch.tensor(self.config.penalties, device=data.mean.device)[:, None]
        self.weights, self.biases = torch.nn.ParameterDict(), torch.nn.ParameterDict()
        self.weight_bounds: dict[str, Float[Tensor, "cell axis penalty out"]] = {}
        self.bias_bounds: dict[str, Float[Tensor, " out"]] = {}
        self.columns: dict[str, slice] = {}
        self.labelled: dict[str, float] = {}  # number of rows with a label per sample
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
                    self.metrics[f"{split}/{target.name}"] = CellScores(cells, penalties)
            bound = torch.tensor(steep, device=data.mean.device)
            self.weight_bounds[form] = data.axes[form].variance[:, :, None, None] * bound + self.penalties
            self.weights[form] = torch.nn.Parameter(torch.zeros(cells, axis, penalties, len(steep)))
            if form != "candidate":  # candidates share one bias, which has no effect on their softmax
                self.bias_bounds[form] = bound
                self.biases[form] = torch.nn.Parameter(torch.zeros(cells, penalties, len(steep)))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises InputError for a checkpoint of something else."""
        check_state(self, checkpoint, str(self.trainer.ckpt_path))

    def forward(self, rows: dict[str, Float[Tensor, "cell sample row axis"]]) -> dict[str, Tensor]:
        """Decision values of every target. The last axis has the classes, the one before it the penalties."""
        values = {f: affine(rows[f], weight, self.biases.get(f, None)) for f, weight in self.weights.items()}
        return {t.name: classes_last(values[t.form][..., self.columns[t.name]], t.form) for t in self.targets}

    def training_step(self, batch: ProbeBatch, index: int) -> Tensor:
        """The objective, summed over all fits."""
        total = torch.zeros((), device=self.device)
        for name, values in self(batch.rows).items():
            loss, correct, count = row_sums(values, batch.labels[name])
            if self.measured:
                self.metrics[f"train/{name}"].update(loss, correct, count)
            # Divided by the average number of labels of a batch of this size, not by the number in this batch. So the
            # gradient is unbiased, and its mean over processes equals the gradient of a single process.
            total = total + loss.sum() * (self.trainer.world_size / (batch.size * self.labelled[name]))
        for weight in self.weights.values():
            total = total + (self.penalties * weight.square()).sum() / 2
        return total

    def validation_step(self, batch: ProbeBatch, index: int) -> None:
        for name, values in self(batch.rows).items():
            self.metrics[f"validation/{name}"].update(*row_sums(values, batch.labels[name]))

    @property
    def measured(self) -> bool:
        """Whether the training curves have a point at this epoch."""
        return (self.current_epoch + 1) % self.trainer.check_val_every_n_epoch == 0

    def configure_optimizers(self) -> Any:
        """`PreconditionedNesterov`; the learning rate decreases linearly to 0 in the last steps."""
        weights = {"params": list(self.weights.values()), "bounds": [self.weight_bounds[f] for f in self.weights]}
        biases = {"params": list(self.biases.values()), "bounds": [self.bias_bounds[f] for f in self.biases]}
        groups = [group for group in (weights, biases) if group["params"]]
        optimizer = PreconditionedNesterov(groups, self.config.lr, MOMENTUM)
        steps = self.trainer.estimated_stepping_batches
        falling = max(1.0, (1 - FLAT) * steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (steps - step) / falling))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @torch.no_grad()
    def on_train_end(self) -> None:
        """Brings fits that are short of their optimum there by Newton steps, and stores probes and certificates."""
        data: ProbeData = self.trainer.datamodule
        train = data.samples["train"]
        x = standardise(train.features[:], data.mean, data.std)
        self.fitted, self.certificates = finished(
            self._trained(data), x, train.labels, self.targets, self.config.penalties, shared
        )

    def _trained(self, data: ProbeData) -> Fitted:
        """Weights and biases for standardised features, converted from the principal axes."""
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
    """One progress bar for the whole fit, over all chunks of cells."""

    def __init__(self, total: int, shown: bool):
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, transient=True, disable=not shown)
        self.task = self.progress.add_task("fitting probes, epoch", total=total)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.is_global_zero and self.progress.console.is_terminal:
            self.progress.start()
        self.progress.advance(self.task, trainer.current_epoch)  # above 0 if an earlier attempt goes on

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.progress.advance(self.task)

    def on_train_end(self, *_: Any) -> None:
        self.progress.stop()

    on_exception = on_train_end


@enough_memory("lower probe.memory")
def fit(samples: ProbeSamples, config: ProbeConfig, trainer: TrainerConfig, folder: Path, seed: int) -> ProbeBank:
    """Fits the probes of all cells and targets and returns them as a bank.

    Features are standardised with the training samples. Every penalty is fitted, and one is kept per target and cell:
    for `ridge` the best on folds inside train, otherwise the one with the highest validation accuracy (ties: the lower
    validation cross-entropy of the final weights). Temperatures are fitted on validation.
    folder: for TensorBoard files, in its subfolder `training`, and for checkpoints, in its subfolder `checkpoints`. A
    call that was killed goes on from its last checkpoint when it is made again, and ends with the same bank. The
    checkpoints are deleted at the end. With several devices, every process calls this function and gets the same bank.
    Cells are fitted in chunks when all together need more than `config.memory`; the result is the same.
    For `logistic` and `newton`, the provenance has for each target the number of fits that `converged` and of all fits,
    and the largest relative `gap`. Fits that did not converge are listed in one printed line.
    Raises InputError, with the name of the target, when a target cannot be fitted.
    """
    train, validation = samples.subset("train"), samples.subset("validation")
    targets = readable_targets(samples.targets, samples.regions)
    check_targets(targets, train, validation)
    parts = chunks(samples, targets, config)
    curves = Path(folder) / TRAINING
    progress = FitProgress(config.epochs * len(parts), trainer.enable_progress_bar)
    drawn = TrainingCurves(lambda statistic: build_logger(trainer, curves / statistic), len(samples.cells))
    monitor = ResourceMonitor(build_logger(trainer, curves), "fit", lambda batch: batch.size)
    saved = SavedFit(Path(folder) / CHECKPOINTS, samples, config, trainer, seed)
    banks: list[ProbeBank] = []
    endings: list[dict[str, Certificate]] = []
    for number, part in enumerate(parts):
        able = {"checkpoints": EpochCheckpoint(saved.checkpoint(number)), "curves": drawn, "resources": monitor}
        runner = _runner(config, trainer, [progress, *(able[name] for name in trainer.callbacks)])
        chunk, held_out = train.at(part), validation.at(part)
        results = saved.load(number, runner)
        if results is None:
            results = _fit_chunk(runner, chunk, held_out, targets, config, seed, saved.resumed(number, runner))
            results |= {DRAWN + name: values for name, values in drawn.state_dict().items()}
            saved.save(number, results, runner)
        else:  # of an earlier attempt
            drawn.load_state_dict({name[len(DRAWN) :]: x for name, x in results.items() if name.startswith(DRAWN)})
            progress.progress.advance(progress.task, config.epochs)
            monitor.done += config.epochs * len(chunk)
        tables: dict[str, Any] = {
            f.name: {t.name: results[f"{f.name}/{t.name}"] for t in targets} for f in fields(Chosen)
        }
        bank = ProbeBank(chunk.cells, tuple(targets), samples.regions, results["mean"], results["std"], **tables)
        banks.append(bank.calibrated(held_out.features[:], held_out.labels))
        return_freed_memory()
        if config.kind != "ridge":
            endings.append(
                {t.name: Certificate(results[f"converged/{t.name}"], results[f"gap/{t.name}"]) for t in targets}
            )
    fitted_with: dict[str, Any] = {"probe": asdict(config), "trainer": asdict(trainer), "seed": seed}
    fitted_with |= {"train": len(train), "validation": len(validation)}
    if endings:
        whole = {t.name: Certificate.join([ended[t.name] for ended in endings]) for t in targets}
        if (line := shortfall(config.kind, whole, samples.cells, config.penalties)) and runner.is_global_zero:
            Console().print(line, markup=False, highlight=False, soft_wrap=True)
        fitted_with["converged"] = {name: one.tally for name, one in whole.items()}
        fitted_with["gap"] = {name: float(one.gap.max()) for name, one in whole.items()}
    saved.remove(runner)
    return ProbeBank.join(banks).with_provenance(**fitted_with)


def _fit_chunk(
    runner: L.Trainer,
    train: ProbeSamples,
    validation: ProbeSamples,
    targets: Sequence[Target],
    config: ProbeConfig,
    seed: int,
    checkpoint: Path | None,
) -> dict[str, Tensor]:
    """Fits the probes of a chunk of cells, from a checkpoint if there is one.

    Returns `mean` and `std`, and the fields of `Chosen` and `Certificate` of every target, as in `weights/answer`.
    """
    if config.kind == "logistic":
        data, module = ProbeData(train, validation, config.batch, seed), ProbeTraining(config)
        with keyboard_interrupts():
            runner.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        data.release()
        held_out = standardise(validation.features[:], data.mean, data.std)
        chosen = _validated(held_out, module.fitted, validation, targets, config.penalties)
        results = _by_name(data.mean, data.std, chosen, module.certificates)
    else:
        device = runner.strategy.root_device
        solve = partial(_solved, train, validation, targets, config, seed, device)
        results = shared(solve, len(train.cells))  # processes exchange weights, which are smaller than features
    return {name: value.cpu().clone(memory_format=torch.contiguous_format) for name, value in results.items()}


def _solved(
    train: ProbeSamples,
    validation: ProbeSamples,
    targets: Sequence[Target],
    config: ProbeConfig,
    seed: int,
    device: torch.device,
    part: slice,
) -> Parts:
    """The results of a kind that is not trained, for the cells of `part`. Features of other cells are not read."""
    values = train.features[:, part]
    mean, std = (statistic.to(device) for statistic in spread(values))
    x = standardise(values, mean, std)
    del values  # as large as x
    if config.kind == "ridge":
        return _by_name(mean, std, fit_ridge(x, train.labels, train.keys, targets, config.penalties, seed), {})
    fitted, ended = newton_targets(x, train.labels, targets, config.penalties)
    held_out = standardise(validation.features[:, part], mean, std)
    return _by_name(mean, std, _validated(held_out, fitted, validation, targets, config.penalties), ended)


def _by_name(
    mean: Float[Tensor, "cell channel"],
    std: Float[Tensor, "cell channel"],
    chosen: Mapping[str, Chosen],
    ended: Mapping[str, Certificate],
) -> Parts:
    """The results of a fit as tensors; see `_fit_chunk`."""
    results = {"mean": mean, "std": std}
    for name, table in (*chosen.items(), *ended.items()):
        results |= {f"{field}/{name}": value for field, value in vars(table).items()}
    return results


def chunks(samples: ProbeSamples, targets: Sequence[Target], config: ProbeConfig) -> list[slice]:
    """Slices of cells that fit into `config.memory` together. They depend on the sizes, not on the machine."""
    count, cells, regions, channels = samples.features.shape
    numbers = count * regions * channels  # standardised features; coordinates of each form are added below
    for form in {t.form for t in targets}:
        width = regions * channels if form == "problem" else channels
        outs = sum(1 if form == "candidate" else t.classes for t in targets if t.form == form)
        axis = min(width, count * (1 if form == "problem" else regions))
        numbers += 2 * count * regions * channels + width * axis + 4 * axis * outs * len(config.penalties)
    size = max(1, int(config.memory * 1e9 / (4 * numbers)))
    return [slice(start, min(start + size, cells)) for start in range(0, cells, size)]


def _runner(config: ProbeConfig, trainer: TrainerConfig, callbacks: Sequence[L.Callback]) -> L.Trainer:
    """The Lightning trainer of the probes. The callbacks log the training."""
    return build_trainer(
        trainer,
        max_epochs=config.epochs,
        check_val_every_n_epoch=max(1, config.epochs // VALIDATIONS),
        num_sanity_val_steps=0,
        enable_checkpointing="checkpoints" in trainer.callbacks,
        plugins=[ChecksumIO()],
        callbacks=list(callbacks),
        enable_progress_bar=False,
    )


def _validated(
    x: Float[Tensor, "cell sample region channel"],
    fitted: Fitted,
    validation: ProbeSamples,
    targets: Sequence[Target],
    penalties: Sequence[float],
) -> dict[str, Chosen]:
    """For every target and cell, the fit with the best penalty on validation. x: standardised validation features."""
    return {t.name: validated(x, validation.labels[t.name], t.form, *fitted[t.name], penalties) for t in targets}
