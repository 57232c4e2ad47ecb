"""Settings of what is captured, and of the probes."""

from __future__ import annotations

from dataclasses import dataclass, field

from cosprobe.bounds import MANY, check_bounds
from cosprobe.cells import parse_selection
from cosprobe.errors import InputError

POOLINGS = ("clip", "frame", "grid", "region", "token")
KINDS = ("logistic", "newton", "ridge")
LEAST_FOLDS, MOST_FOLDS = 3, 50


@dataclass
class CaptureConfig:
    """What is captured. Raises InputError for an unknown pooling or a negative number of samples."""

    layers: str = "all"
    "Layers: `all`, `last`, `3`, `0:30:5` or `0,10,20`."
    steps: str = "all"
    "Step indices (0 = noisiest), written as `layers`."
    pooling: str = "region"
    "What features are averaged over: clip, frame, grid or region; token: nothing, every token is a position."
    frames: bool = False
    "With `region`, also keep every latent frame separately."
    project: int = 0
    "Number of random combinations of channels that are kept in place of the channels, to save disk; 0: all channels."
    decode: str = "auto"
    "Step indices at which x0-hat is decoded and parsed; `auto`: at most five."
    random_weights: int = 128
    "Largest number of samples for which transformers with permuted and fresh weights are run; 0: none."

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise InputError(f"probe.pooling={self.pooling!r}: expected one of {', '.join(POOLINGS)}")
        check_bounds("probe.", self, random_weights=(0, MANY), project=(0, MANY))

    def layers_kept(self, depth: int) -> tuple[int, ...]:
        """The captured layers of a transformer with `depth` blocks."""
        return parse_selection(self.layers, depth, "probe.layers")

    def steps_kept(self, total: int) -> tuple[int, ...]:
        """The captured step indices, for a sampler with `total` steps."""
        return parse_selection(self.steps, total, "probe.steps")

    def steps_decoded(self, total: int) -> tuple[int, ...]:
        """The step indices at which x0-hat is decoded, for a sampler with `total` steps."""
        return decode_steps(self.decode, total)


@dataclass
class ProbeConfig(CaptureConfig):
    """What is captured, and hyperparameters of the probes. Raises InputError for a value out of range."""

    kind: str = "logistic"
    "Kind of probes: `logistic`, `newton` (the same probes, another solver) or `ridge`."
    penalties: list[float] = field(default_factory=lambda: [0.01, 0.1, 1.0])
    "Candidates for the penalty, on standardised features; one is chosen per target and cell, on validation or folds."
    epochs: int = 10
    "Epochs of `logistic`, before the Newton steps."
    lr: float = 1.0
    "Learning rate of `logistic`, as a fraction of the largest safe step."
    batch: int = 4096
    "Samples per batch of `logistic`; the size of the training set works best, less saves memory."
    memory: float = 0.5
    "GB for the cells that are fitted together: features, copies of them, and the state of the optimiser."
    folds: int = 0
    "For few problems: this many folds of problems are test problems in turn (cross-fitting); 0: one split."

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in KINDS:
            raise InputError(f"probe.kind={self.kind!r}: expected one of {', '.join(KINDS)}")
        if not self.penalties:
            raise InputError("probe.penalties=[]: expected one or more penalties above 0")
        check_bounds(
            "probe.", self, penalties=(1e-9, 1e9), epochs=(1, 100_000), lr=(1e-6, 1.0), batch=(1, 10**9),
            memory=(0.001, 1e5),
        )  # fmt: skip
        check_folds(self.folds, "probe.folds")


def check_folds(folds: int, name: str) -> None:
    """Raises InputError unless `folds` is 0 (one split) or enough for training, validation and test."""
    if folds and not LEAST_FOLDS <= folds <= MOST_FOLDS:
        raise InputError(
            f"{name}={folds}: expected 0, or {LEAST_FOLDS} to {MOST_FOLDS}: at least one fold each for training, "
            "validation and test"
        )


def decode_steps(spec: str, total: int) -> tuple[int, ...]:
    """Step indices at which x0-hat is decoded and parsed. `auto`: at most 5, denser among the early steps."""
    if spec == "auto":
        return tuple(
            sorted({0, round(0.1 * total), round(0.25 * total), round(0.5 * total), total - 1} & set(range(total)))
        )
    return parse_selection(spec, total, "probe.decode")
