"""Schedulers: how `step` is called, which step runs, and the clean latent that a model output stands for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import Tensor

from cosprobe.errors import InputError
from cosprobe.wrapping import wrapped

# What is mixed into a noisy latent, by class. `flow`: (1 - sigma) x0 + sigma noise. `alphas`: sqrt(a) x0 + sqrt(1 - a)
# noise, with a = alphas_cumprod at the timestep. `sigmas`: the same, with a = 1 / (1 + sigma^2). `added`: x0 + sigma
# noise. The multistep ones mix as their settings say.
SCHEDULERS = {
    "FlowMatchEulerDiscreteScheduler": "flow",
    "UniPCMultistepScheduler": "sigmas",
    "DPMSolverMultistepScheduler": "sigmas",
    "DDIMScheduler": "alphas",
    "CogVideoXDDIMScheduler": "alphas",
    "CogVideoXDPMScheduler": "alphas",
    "EulerDiscreteScheduler": "added",
    "EulerAncestralDiscreteScheduler": "added",
}


class StepCall(NamedTuple):
    """The arguments of one call of a scheduler's `step`, by meaning. timestep: as the pipeline passes it."""

    output: Tensor
    timestep: Any
    noisy: Tensor


class X0Weights(NamedTuple):
    """x0-hat = noisy * `noisy` + output * `output`; each is a number."""

    noisy: float
    output: float


class NoiseLevel(NamedTuple):
    """A noisy latent = `signal` * x0 + `noise` * standard Gaussian noise. unit: standard deviation of a latent that is
    all noise, as the first step of a run gets it."""

    signal: float
    noise: float
    unit: float


def check_scheduler(scheduler: Any) -> None:
    """Raises InputError for a scheduler that is not in SCHEDULERS, or that evaluates the model several times a step."""
    name = type(scheduler).__name__
    if getattr(scheduler, "order", 1) != 1:
        raise InputError(
            f"{name} calls the model {scheduler.order} times per step: expected a first-order scheduler, e.g. "
            "FlowMatchEulerDiscreteScheduler"
        )
    if name not in SCHEDULERS:
        raise InputError(f"scheduler {name} is not known: expected one of {', '.join(SCHEDULERS)}")
    kind, flow = _prediction(scheduler), ("flow_prediction",) if SCHEDULERS[name] in ("flow", "sigmas") else ()
    if kind not in (expected := (*flow, "v_prediction", "epsilon", "sample")):
        raise InputError(f"{name} predicts {kind!r}: expected {', '.join(expected)}")


def step_call(scheduler: Any, args: tuple, kwargs: dict[str, Any]) -> StepCall:
    """The arguments of a call of `scheduler.step`, found by their names: their order differs between schedulers."""
    given = inspect.signature(type(scheduler).step).bind(scheduler, *args, **kwargs).arguments
    return StepCall(given["model_output"], given["timestep"], given["sample"])


def with_output(scheduler: Any, args: tuple, kwargs: dict[str, Any], output: Tensor) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a call of `scheduler.step` with another model output."""
    bound = inspect.signature(type(scheduler).step).bind(scheduler, *args, **kwargs)
    bound.arguments["model_output"] = output
    return bound.args[1:], bound.kwargs


def x0_weights(scheduler: Any, timestep: Any) -> X0Weights:
    """How x0-hat follows from the noisy latent and the model output in the step that begins now.

    timestep: as the pipeline passes it to `step`. Flow matching: x0 = x - sigma v (arXiv 2603.16870, section 3.1).
    Raises InputError as `check_scheduler` does.
    """
    check_scheduler(scheduler)
    kind, mix = _prediction(scheduler), SCHEDULERS[type(scheduler).__name__]
    if kind == "sample":
        return X0Weights(0.0, 1.0)
    if kind == "flow_prediction":
        end = 1.0 if scheduler.config.get("invert_sigmas", False) else 0.0  # Mochi counts from noise to data
        return X0Weights(1.0, end - _sigma(scheduler, timestep))
    if mix == "added":
        sigma = _sigma(scheduler, timestep)
        of_velocity = X0Weights(1 / (sigma**2 + 1), -sigma / (sigma**2 + 1) ** 0.5)
        return X0Weights(1.0, -sigma) if kind == "epsilon" else of_velocity
    if mix == "sigmas":
        signal, noise = _of_sigma(scheduler, _sigma(scheduler, timestep))
    else:
        alpha = float(scheduler.alphas_cumprod[int(timestep)])
        signal, noise = alpha**0.5, (1 - alpha) ** 0.5
    return X0Weights(1 / signal, -noise / signal) if kind == "epsilon" else X0Weights(signal, -noise)


def noise_level(scheduler: Any, step: int) -> NoiseLevel:
    """What the latent of a step (a step index) of the running call is mixed from. Errors: see `check_scheduler`."""
    check_scheduler(scheduler)
    mix = SCHEDULERS[type(scheduler).__name__]
    if mix == "alphas":
        alpha = float(scheduler.alphas_cumprod[int(scheduler.timesteps[step])])
        return NoiseLevel(alpha**0.5, (1 - alpha) ** 0.5, 1.0)
    sigma = float(scheduler.sigmas[step])
    if mix == "flow":
        inverted = scheduler.config.get("invert_sigmas", False)  # Mochi counts from noise to data
        return NoiseLevel(sigma, 1 - sigma, 1.0) if inverted else NoiseLevel(1 - sigma, sigma, 1.0)
    if mix == "added":
        return NoiseLevel(1.0, sigma, (1 + sigma**2) ** 0.5 if step else float(scheduler.init_noise_sigma))
    return NoiseLevel(*_of_sigma(scheduler, sigma), 1.0)


def _of_sigma(scheduler: Any, sigma: float) -> tuple[float, float]:
    """Signal and noise of a multistep scheduler at a sigma."""
    if scheduler.config.get("use_flow_sigmas", False):
        return 1 - sigma, sigma
    return (1 + sigma**2) ** -0.5, sigma * (1 + sigma**2) ** -0.5


def clean_estimate(scheduler: Any, call: StepCall) -> Tensor:
    """x0-hat, the model's estimate of the clean latent, in float32. Errors: see `x0_weights`."""
    weights = x0_weights(scheduler, call.timestep)
    return weights.noisy * call.noisy.float() + weights.output * call.output.float()


def output_for(scheduler: Any, call: StepCall, clean: Tensor) -> Tensor:
    """The model output whose x0-hat is `clean`: the inverse of `clean_estimate`."""
    weights = x0_weights(scheduler, call.timestep)
    return (clean - weights.noisy * call.noisy.float()) / weights.output


def matches_flow(scheduler: Any) -> bool:
    """Whether the scheduler is for a model of flow matching."""
    mix = SCHEDULERS.get(type(scheduler).__name__)
    return mix == "flow" or (mix == "sigmas" and _prediction(scheduler) == "flow_prediction")


def _prediction(scheduler: Any) -> str:
    if SCHEDULERS.get(type(scheduler).__name__) == "flow":
        return "flow_prediction"  # a configuration can hold the entry of the scheduler that it was made from
    return scheduler.config.get("prediction_type", "epsilon")


def _sigma(scheduler: Any, timestep: Any) -> float:
    """The noise level of the step that begins now. The scheduler finds its index in the first step, and then counts."""
    index = scheduler.step_index
    if index is None:
        index = scheduler.begin_index
    if index is None:
        index = scheduler.index_for_timestep(timestep)
    return float(scheduler.sigmas[index])


class StepCount:
    """The index of the step that a running pipeline is at.

    now: number of steps of the scheduler that are finished in this call of the pipeline.
    """

    now: int = 0


@contextmanager
def counted_steps(pipeline: Any) -> Iterator[StepCount]:
    """Counts the steps of the scheduler in every pipeline call that is made inside the context.

    Timesteps do not name a step: two can be equal, and pipelines keep them in different forms or not at all.
    """
    count = StepCount()

    def begin(original: Callable, *args: Any, **kwargs: Any) -> Any:
        count.now = 0
        return original(*args, **kwargs)

    def step(original: Callable, *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        count.now += 1
        return result

    with ExitStack() as undo:
        undo.enter_context(wrapped(pipeline.scheduler, "set_timesteps", begin))
        undo.enter_context(wrapped(pipeline.scheduler, "step", step))
        yield count


@contextmanager
def from_first_step(scheduler: Any) -> Iterator[None]:
    """Tells the scheduler, in every call made inside the context, that sampling begins at its first step.

    Some pipelines leave it to find the step from the first timestep. Where UniPC and DPM-Solver++ round the first two
    timesteps to the same number, they find the second, and fail at the end.
    """

    def begin(original: Callable, *args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)

    with wrapped(scheduler, "set_timesteps", begin):
        yield
