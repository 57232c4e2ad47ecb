"""x0-hat of every scheduler, against what the scheduler says itself and against what it mixes."""

from __future__ import annotations

from types import SimpleNamespace

import diffusers
import pytest
import torch

from cosprobe.errors import InputError
from cosprobe.models.schedulers import (
    SCHEDULERS,
    StepCall,
    clean_estimate,
    counted_steps,
    from_first_step,
    noise_level,
    output_for,
    step_call,
    with_output,
)

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
KINDS = [
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("UniPCMultistepScheduler", FLOW | {"flow_shift": 3.0}),
    ("DPMSolverMultistepScheduler", FLOW | {"flow_shift": 3.0}),
    *((name, {"prediction_type": kind}) for name in ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler",
      "EulerDiscreteScheduler") for kind in ("epsilon", "v_prediction", "sample")),
    # UniPC divides by 1e-6 in its first step with flow sigmas and `epsilon`, which leaves nothing but rounding errors
    *((name, {"use_flow_sigmas": True, "prediction_type": kind}) for name, kind in (("UniPCMultistepScheduler",
      "v_prediction"), ("DPMSolverMultistepScheduler", "epsilon"), ("DPMSolverMultistepScheduler", "v_prediction"))),
    # diffusers has not built `sample` for it
    *(("EulerAncestralDiscreteScheduler", {"prediction_type": kind}) for kind in ("epsilon", "v_prediction")),
    *((name, {"prediction_type": kind, "clip_sample": False, "rescale_betas_zero_snr": False})
      for name in ("DDIMScheduler", "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")
      for kind in ("epsilon", "v_prediction", "sample")),
]  # fmt: skip
STEPS = 5


def begun(name, settings):
    scheduler = getattr(diffusers, name)(**settings)
    scheduler.set_timesteps(STEPS)
    return scheduler


def said(scheduler, call, old) -> torch.Tensor:
    """x0-hat as the scheduler computes it in this step."""
    if hasattr(scheduler, "convert_model_output"):
        if scheduler.step_index is None:
            scheduler._init_step_index(call.timestep)
        return scheduler.convert_model_output(call.output, sample=call.noisy)
    if type(scheduler).__name__ == "CogVideoXDPMScheduler":
        return scheduler.step(call.output, old, call.timestep, None, call.noisy, return_dict=False)[1]
    if type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler":
        return call.noisy - float(scheduler.sigmas[scheduler.step_index or 0]) * call.output
    return scheduler.step(call.output, call.timestep, call.noisy).pred_original_sample


def test_every_scheduler_is_tried():
    assert {name for name, _ in KINDS} == set(SCHEDULERS)


@pytest.mark.parametrize(("name", "settings"), KINDS)
def test_the_estimate_is_that_of_the_scheduler_at_every_step(name, settings):
    scheduler = begun(name, settings)
    noisy = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    for timestep in scheduler.timesteps:
        call = StepCall(torch.randn_like(noisy), timestep, noisy)
        mine = clean_estimate(scheduler, call)
        torch.testing.assert_close(output_for(scheduler, call, mine), call.output, rtol=1e-3, atol=1e-3)
        other = begun(name, settings)
        if getattr(scheduler, "step_index", None) is not None:
            other._step_index = scheduler.step_index
        torch.testing.assert_close(mine, said(other, call, None), rtol=1e-4, atol=1e-4)
        given = (call.output, None, timestep, None, noisy) if "DPMS" in name and "Cog" in name else call
        noisy = scheduler.step(*given, return_dict=False)[0]


def test_equal_timesteps_are_different_steps():
    """UniPC rounds timesteps to whole numbers: with 120 steps and shift 12 the first two are equal."""
    scheduler = diffusers.UniPCMultistepScheduler(**FLOW, flow_shift=12.0)
    pipeline, now = SimpleNamespace(scheduler=scheduler), []
    with counted_steps(pipeline) as count, from_first_step(scheduler):
        scheduler.set_timesteps(120)
        assert len(set(scheduler.timesteps.tolist())) < 120
        noisy = torch.randn(1, 2)
        for timestep in scheduler.timesteps:
            now.append(count.now)
            noisy = scheduler.step(torch.zeros_like(noisy), timestep, noisy, return_dict=False)[0]
    assert now == list(range(120))
    assert "step" not in vars(scheduler) and "set_timesteps" not in vars(scheduler)


def test_arguments_are_found_by_name():
    scheduler = diffusers.CogVideoXDPMScheduler()
    output, old, noisy, other = torch.randn(4, 1, 2)
    args, kwargs = (output, old, 999, 800, noisy), {"eta": 0.0, "return_dict": False}
    assert step_call(scheduler, args, kwargs) == (output, 999, noisy)
    changed, rest = with_output(scheduler, args, kwargs, other)
    given = type(scheduler).step.__wrapped__ if hasattr(type(scheduler).step, "__wrapped__") else None
    assert given is None or rest
    assert step_call(scheduler, changed, rest) == (other, 999, noisy)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("FlowMatchHeunDiscreteScheduler", {}, r"FlowMatchHeun.*\b2\b"),
        ("LCMScheduler", {}, "LCMScheduler.*UniPC"),
        ("DDIMScheduler", {"prediction_type": "noise"}, "'noise'.*epsilon"),
        ("EulerDiscreteScheduler", {"prediction_type": "flow_prediction"}, "'flow_prediction'.*v_prediction, epsilon"),
    ],
)
def test_other_schedulers_are_refused(name, settings, message):
    scheduler = getattr(diffusers, name)(**settings)
    with pytest.raises(InputError, match=message):
        clean_estimate(scheduler, StepCall(torch.zeros(1), 999, torch.zeros(1)))


LEVELS = [
    *KINDS,
    ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}),
    *((name, {"timestep_spacing": spacing}) for name in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
      for spacing in ("leading", "linspace", "trailing")),
    *((name, {"use_flow_sigmas": True, "prediction_type": "epsilon"}) for name in ("UniPCMultistepScheduler",
      "DPMSolverMultistepScheduler")),
    *((name, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing",
              "snr_shift_scale": 3.0}) for name in ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "settings"), LEVELS)
def test_a_noise_level_is_what_the_scheduler_mixes_itself(name, settings):
    scheduler = begun(name, settings)
    clean, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    mixes = getattr(scheduler, "add_noise", None) or (lambda x0, noise, t: scheduler.scale_noise(x0, t, noise))
    for step, timestep in enumerate(scheduler.timesteps):
        level = noise_level(scheduler, step)
        pair = (noise, clean) if settings.get("invert_sigmas") else (clean, noise)  # diffusers takes no notice of it
        expected = mixes(*pair, timestep.repeat(2))
        torch.testing.assert_close(level.signal * clean + level.noise * noise, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "settings"), LEVELS)
def test_a_run_begins_with_noise_of_the_unit(name, settings):
    scheduler = begun(name, settings)
    assert noise_level(scheduler, 0).unit == pytest.approx(float(getattr(scheduler, "init_noise_sigma", 1.0)))
    level = noise_level(scheduler, STEPS - 1)  # later: of data of variance 1, such as another draw of noise, mixed so
    mixed = (level.signal**2 + level.noise**2) ** 0.5 if "Euler" in name and "Flow" not in name else 1.0
    assert level.unit == pytest.approx(mixed)


def test_the_noise_level_of_another_scheduler_is_refused():
    with pytest.raises(InputError, match=r"LCMScheduler.*UniPC"):
        noise_level(diffusers.LCMScheduler(), 0)
