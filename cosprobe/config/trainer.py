"""Settings of Lightning's `Trainer`."""

from __future__ import annotations

from dataclasses import dataclass, field

from cosprobe.bounds import MANY, check_bounds
from cosprobe.errors import InputError

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
CALLBACKS = ("checkpoints", "curves", "resources")
LOGGERS = ("tensorboard", "csv", "wandb")


@dataclass
class TrainerConfig:
    """Where models sample and probes are fitted: arguments of `lightning.Trainer`, under its names.

    Raises InputError for a value out of range.
    """

    accelerator: str = "auto"
    "Device type: `cpu`, `gpu`, `mps`, ...; `auto`: GPU with CUDA if there is one, otherwise CPU."
    devices: str = "auto"
    "Number of devices, or their indices such as `'0,2'`; one process per device. `auto`: all GPUs, or one CPU process."
    num_nodes: int = 1
    "Number of machines."
    strategy: str = "auto"
    "How processes work together, such as `ddp`."
    precision: str = "32-true"
    "Precision of the training of `logistic` probes; the Newton steps after it are in float32 or better."
    logger: str = "tensorboard"
    "Where curves go: `tensorboard`, `csv` or `wandb` (if installed)."
    callbacks: list[str] = field(default_factory=lambda: list(CALLBACKS))
    "`checkpoints`: a killed fit goes on; `curves`: of the training; `resources`: speed and memory. `[]`: none."
    enable_progress_bar: bool = True
    "Show progress bars."
    deterministic: bool = False
    "Use deterministic algorithms only."
    limit_predict_batches: int | None = None
    "Stop sampling after so many batches per process; the same command continues. null: no limit."
    timeout: float = 1800.0
    "Seconds that a process waits for another one in a communication."

    def __post_init__(self) -> None:
        self.devices = str(self.devices)  # in Python, a number is as good
        if self.precision not in PRECISIONS:
            raise InputError(f"trainer.precision={self.precision!r}: expected one of {', '.join(PRECISIONS)}")
        if self.logger not in LOGGERS:
            raise InputError(f"trainer.logger={self.logger!r}: expected one of {', '.join(LOGGERS)}")
        for name in self.callbacks:
            if name not in CALLBACKS:
                raise InputError(f"trainer.callbacks={name!r}: expected some of {', '.join(CALLBACKS)}")
        check_bounds("trainer.", self, num_nodes=(1, 10_000), limit_predict_batches=(1, MANY), timeout=(1, 10**7))
