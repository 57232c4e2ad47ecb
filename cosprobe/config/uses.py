"""Settings of what `probe.py` does with trained probes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from cosprobe.bounds import MANY, check_bounds
from cosprobe.errors import InputError

ERROR_REFERENCES = ("model_answer", "truth")
SIZES = ("quick", "full")
EDITS = ("noise", "swap", "steer", "erase", "ablate")


@dataclass
class PredictConfig:
    """Read the answers of new problems at one step, before the video is finished."""

    step: int = 0
    "Step index at which answers are read, 0 = noisiest."
    problems: int = 16
    "Number of new problems."
    layer: int | None = None
    "Layer that the probe reads; null: the layer with the best validation accuracy."

    def __post_init__(self) -> None:
        check_bounds("use.", self, step=(0, 10_000), problems=(1, MANY), layer=(0, 10_000))


@dataclass
class EarlyConfig:
    """Stop a run as soon as a probe is confident enough; the risk is at most `risk`, with probability `confidence`."""

    report: ClassVar[str] = "early"  # the folder of its report
    risk: float = 0.05
    "Largest share of errors."
    confidence: float = 0.95
    "Probability with which the share of errors is at most `risk`, over the draw of the calibration problems."
    error_reference: str = "model_answer"
    "What an error is: an answer other than that of the finished video (`model_answer`), or a wrong answer (`truth`)."
    calibration: int = 300
    "Number of problems of each kind that calibrate the policy."
    problems: int = 60
    "Number of fresh problems of each kind that test it."

    def __post_init__(self) -> None:
        if self.error_reference not in ERROR_REFERENCES:
            raise InputError(
                f"use.error_reference={self.error_reference!r}: expected one of {', '.join(ERROR_REFERENCES)}"
            )
        check_promise(self.risk, self.confidence, self.calibration)
        check_bounds("use.", self, problems=(1, MANY), calibration=(1, MANY))


@dataclass
class EnsembleConfig:
    """Compare seed ensembles at equal compute."""

    report: ClassVar[str] = "ensemble"  # the folder of its report
    size: str = "quick"
    "`quick` (minutes) or `full` (about an hour; it can be interrupted and continues)."

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise InputError(f"use.size={self.size!r}: expected one of {', '.join(SIZES)}")


@dataclass
class InterveneConfig:
    """Change runs while they are sampled, and measure what follows, with controls."""

    edit: str = "swap"
    "`noise` in the latent, `swap` of hidden states, `steer` along a probe, `erase` a concept, or `ablate` blocks."
    size: str = "quick"
    "`quick` (3 steps, 3 layers, minutes) or `full` (5 steps, up to 8 layers; it can be interrupted and continues)."
    problems: int = 0
    "Number of new problems; 0: 24, or 72 with `use.size=full`."
    seeds: int = 1
    "Noise seeds of each problem; donors of `swap` are other seeds of the same problem, where their answers differ."
    kind: str = ""
    "Kind of the problems; empty: the first kind of the task."
    steps: str = ""
    "Steps that are changed, a selection such as `0,5,10`; empty: evenly spaced ones."
    layers: str = ""
    "Layers that are changed, a selection such as `1::2`; empty: evenly spaced ones."
    target: str = ""
    "The target whose probes `steer` and `erase` use; empty: the answer."
    doses: list[float] = field(default_factory=lambda: [0.25, 0.5, 1.0, 2.0])
    "Doses of `steer`: 1 adds a vector as long as a token is on average. Random directions have the second largest."
    directions: int = 20
    "Number of random directions that `steer` is compared with."
    margin: float = 0.1
    "A decodable cell counts as not used when the upper bound of its effect is below this share."

    def __post_init__(self) -> None:
        if self.edit not in EDITS:
            raise InputError(f"use.edit={self.edit!r}: expected one of {', '.join(EDITS)}")
        if self.size not in SIZES:
            raise InputError(f"use.size={self.size!r}: expected one of {', '.join(SIZES)}")
        check_bounds("use.", self, problems=(0, MANY), seeds=(1, 10_000), directions=(20, 10_000))
        if not self.doses or not all(math.isfinite(dose) and dose >= 0 for dose in self.doses):
            raise InputError(f"use.doses={self.doses}: expected at least one number, 0 or more")
        if not 0 < self.margin < 1:
            raise InputError(f"use.margin={self.margin}: expected more than 0 and less than 1")

    @property
    def report(self) -> str:
        """Name of the folder of the report: `causal-swap`, or with other settings than the default ones
        `causal-swap-choice-8problems`, so that a small experiment does not replace a larger one."""
        parts = [self.edit, self.kind, self.size if self.size != SIZES[0] else ""]
        parts += [f"{n}{name}" for n, name in ((self.problems, "problems"),) if n]
        return "-".join(["causal", *filter(None, parts)])


@dataclass
class ShownConfig:
    """What a use draws: new problems, or an image of the user's."""

    problems: int = 1
    "Number of new problems."
    kind: str = ""
    "Kind of the problems; empty: the first kind of the task."
    image: str = ""
    "An image file to start from instead of problems; it needs `use.prompt`."
    prompt: str = ""
    "The prompt for `use.image`."

    def __post_init__(self) -> None:
        check_bounds("use.", self, problems=(1, 1000))
        if bool(self.image) != bool(self.prompt):
            given, missing = ("image", "prompt") if self.image else ("prompt", "image")
            raise InputError(f"use.{given}={getattr(self, given)!r}: needs use.{missing} too")


@dataclass
class FilmConfig(ShownConfig):
    """Write x0-hat at every step as a video, with what the probe reads beside it."""

    report: ClassVar[str] = "film"
    steps: str = "all"
    "Steps at which x0-hat is decoded, a selection such as `0:20:5`."


@dataclass
class TokensConfig(ShownConfig):
    """Measure every token of some layers and steps, and draw the numbers over the picture."""

    report: ClassVar[str] = "tokens"
    problems: int = 1
    "Number of new problems; the first one is drawn, all are saved. From 12 on, the energy of the path is tested."
    layers: str = ""
    "Layers, a selection such as `1::2`; empty: at most 5 evenly spaced ones."
    steps: str = ""
    "Steps, a selection such as `0,5,10`; the last one is always added. Empty: at most 5 evenly spaced ones."


@dataclass
class BehaviourConfig:
    """Measure behaviours along the denoising steps again, from stored activations; on request, sample a null."""

    problems: int = 0
    "Number of new problems that are sampled to the end, and again from x0-hat with fresh noise; 0: samples nothing."
    steps: str = ""
    "Steps whose x0-hat is continued with fresh noise, such as `0,2,5`; empty: the first three decoded ones."

    def __post_init__(self) -> None:
        check_bounds("use.", self, problems=(0, MANY))
        if self.steps and not self.problems:
            raise InputError(f"use.steps={self.steps!r}: nothing is sampled; expected use.problems too")

    @property
    def report(self) -> str:
        """Name of the folder of the report: `behaviour`, or with new problems such as `behaviour-64problems`."""
        return f"behaviour-{self.problems}problems" if self.problems else "behaviour"


@dataclass
class LengthsConfig:
    """Sample the same problems with other numbers of frames and of steps: how many answers are right?"""

    frames: list[int] = field(default_factory=lambda: [5, 9, 13, 17])
    "Numbers of video frames, each sampled with the number of steps of the run; `[]`: no others."
    steps: list[int] = field(default_factory=lambda: [5, 10, 20, 50])
    "Numbers of steps, each sampled with the number of frames of the run; `[]`: no others."
    problems: int = 96
    "Number of new problems."
    kind: str = ""
    "Kind of the problems; empty: the first kind of the task."

    def __post_init__(self) -> None:
        check_bounds("use.", self, problems=(2, MANY))
        for name in ("frames", "steps"):
            if wrong := [value for value in getattr(self, name) if not 1 <= value <= 10_000]:
                raise InputError(f"use.{name}={getattr(self, name)}: {wrong[0]} is not from 1 to 10000")

    @property
    def report(self) -> str:
        """Name of the folder of the report: `lengths`, or with another kind or number of problems than the default
        ones such as `lengths-choice-8problems`, so that a small sweep does not replace a larger one."""
        few = f"{self.problems}problems" if self.problems != LengthsConfig().problems else ""
        return "-".join(["lengths", *filter(None, [self.kind, few])])


@dataclass
class CompareConfig:
    """Compare finished runs on one task, cell by cell: each of `runs` with the first one."""


@dataclass
class RunsConfig:
    """List the run folders in the folder `run`, with their sizes, or delete one of them."""

    delete: str = ""
    "A run folder to delete, or a result or the activations (`store`) in one; empty: only list."


def check_promise(risk: float, level: float, problems: int) -> None:
    """Raises InputError for a risk or confidence outside 0 to 1, or fewer calibration problems than any policy
    needs."""
    for name, value in (("risk", risk), ("confidence", level)):
        if not 0 < value < 1:
            raise InputError(f"use.{name}={value}: expected more than 0 and less than 1")
    least = least_without_errors(risk, level)
    if problems < least:
        raise InputError(
            f"use.calibration={problems}: expected at least {least} problems, the least number that can show a risk of "
            f"{risk:g} at confidence {level:g} (without a single error); raise it or allow more risk"
        )


def least_without_errors(risk: float, level: float) -> int:
    """The least number of calibration problems with which a policy without a single error passes.

    Among n problems p is then (1 - risk)**n, which must be at most 1 - level.
    """
    return math.ceil(math.log(1 - level) / math.log(1 - risk) - 1e-9)
