"""What a model is sampled with if the settings say nothing, and what is refused before anything is loaded."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cosprobe.activations import Pooling, capture
from cosprobe.command import load
from cosprobe.config import PipelineConfig, TrainRun
from cosprobe.errors import InputError
from cosprobe.models.defaults import taken_defaults, with_defaults
from cosprobe.models.loading import load_pipeline, with_scheduler
from cosprobe.models.pipelines import check_prompts, check_size, experts
from tests.conformity.checks import Case
from tests.examples.families import FAMILIES
from tests.examples.pipelines import wan

ROOT = Path(__file__).resolve().parents[2]
PRESETS = sorted(path.stem for path in (ROOT / "configs" / "pipeline").glob("*.yaml") if path.stem != "mini")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of each of these families, made when it is asked for."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "model"
            FAMILIES[name].build().save_pretrained(made[name])
        return made[name]

    return folder


@pytest.mark.parametrize(
    ("name", "steps", "guidance", "frames", "tokens"),
    [
        ("wan22_t2v", 50, 5.0, 81, 512),
        ("wan21_i2v", 50, 5.0, 81, 512),
        ("ltx_i2v", 50, 3.0, 161, 128),
        ("cogvideox_t2v", 50, 6.0, 9, 32),  # as many frames as its configuration says, as many tokens as its positions
        ("hunyuan_t2v", 50, 6.0, 129, 256),
        ("mochi", 64, 4.5, 19, 256),
        ("allegro", 100, 7.5, 24, 512),
    ],
)
def test_they_are_those_of_the_pipeline(saved, name, steps, guidance, frames, tokens):
    asked = PipelineConfig(path=str(saved(name)))
    for found in (with_defaults(asked), with_defaults(PipelineConfig(), Case(name, False).pipeline)):
        assert (found.steps, found.guidance, found.frames, found.prompt_tokens) == (steps, guidance, frames, tokens)
        assert found.dtype == "float32"
    typed = with_defaults(PipelineConfig(path=str(saved(name)), steps=3, dtype="bfloat16"))
    assert (typed.steps, typed.dtype, typed.frames) == (3, "bfloat16", frames)
    told = taken_defaults(asked, with_defaults(asked))
    assert f"steps={steps}" in told and f"frames={frames}" in told


def test_the_type_of_weights_is_that_of_the_files(tmp_path):
    wan().to(torch.bfloat16).save_pretrained(tmp_path)
    config = with_defaults(PipelineConfig(path=str(tmp_path), vae_dtype="float32"))
    assert config.dtype == "bfloat16"
    pipeline = load_pipeline(config)
    assert (pipeline.transformer.dtype, pipeline.vae.dtype) == (torch.bfloat16, torch.float32)


def test_the_model_in_the_package_says_how_it_is_sampled():
    found = with_defaults(PipelineConfig())
    assert (found.steps, found.guidance, found.frames, found.prompt_tokens, found.dtype) == (20, 1.0, 13, 32, "float32")
    assert load(TrainRun, ["task.frames=17"]).pipeline.frames == 17


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_complete(name):
    found = load(TrainRun, [f"pipeline={name}"]).pipeline
    assert found.on_hub and found.name == name and found.batch == 1
    assert all((found.steps, found.guidance, found.frames, found.height, found.width, found.prompt_tokens, found.dtype))


def index(folder: Path, **changes: object) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "AntigravityPipeline"}, "'AntigravityPipeline'.*diffusers"),
        ({"_class_name": ["pipeline", "Mine"]}, "pipeline.*diffusers"),
        ({"_class_name": "HeliosPipeline"}, r"HeliosPipeline.*loop.*support\.md"),
        ({"_class_name": "LTX2Pipeline"}, r"LTX2Pipeline is not supported yet.*support\.md"),
        ({"transformer": ["this", "Zen"]}, "library 'this'.*diffusers, transformers"),
    ],
)
def test_nothing_but_diffusers_and_transformers_is_imported(tmp_path, changes, message, capsys):
    wan().save_pretrained(tmp_path / "wan")
    index(tmp_path / "wan", **changes)
    with pytest.raises(InputError, match=message):
        load_pipeline(PipelineConfig(path=str(tmp_path / "wan")))
    assert "Beautiful is better" not in capsys.readouterr().out  # what `import this` prints


def test_a_model_on_the_hub_is_found_or_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for module in ("huggingface_hub.constants",):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)
    assert PipelineConfig(path="Wan-AI/Wan2.1-T2V-1.3B-Diffusers").on_hub
    assert not any(PipelineConfig(path=path).on_hub for path in ("", "mini", "./a/b", "a/b/c", "/a/b", "a"))
    with pytest.raises(InputError, match="'org/none'.*download"):
        load_pipeline(PipelineConfig(path="org/none"))


def test_another_class_of_pipeline_gives_the_model_its_image(saved):
    folder = saved("wan22_ti2v_t2v")
    assert type(load_pipeline(PipelineConfig(path=str(folder)))).__name__ == "WanPipeline"
    as_image = load_pipeline(PipelineConfig(path=str(folder), kind="WanImageToVideoPipeline"))
    assert type(as_image).__name__ == "WanImageToVideoPipeline" and as_image.config.expand_timesteps
    with pytest.raises(InputError, match=r"pipeline\.kind='Nothing'"):
        load_pipeline(PipelineConfig(path=str(folder), kind="Nothing"))


def test_schedulers_are_exchanged():
    flow = wan().scheduler
    unipc = with_scheduler(flow, PipelineConfig(scheduler="UniPCMultistepScheduler", flow_shift=7.0))
    assert type(unipc).__name__ == "UniPCMultistepScheduler"
    assert (unipc.config.flow_shift, unipc.config.prediction_type, unipc.config.use_flow_sigmas) == (
        7.0, "flow_prediction", True,
    )  # fmt: skip
    assert (
        with_scheduler(flow, PipelineConfig(scheduler="UniPCMultistepScheduler")).config.flow_shift == flow.config.shift
    )
    back = with_scheduler(unipc, PipelineConfig(scheduler="FlowMatchEulerDiscreteScheduler", flow_shift=2.0))
    assert (type(back).__name__, back.config.shift) == ("FlowMatchEulerDiscreteScheduler", 2.0)
    assert with_scheduler(flow, PipelineConfig()) is flow
    diffusion = Case("cogvideox_t2v", False).pipeline.scheduler
    for one, name in ((flow, "DDIMScheduler"), (unipc, "EulerDiscreteScheduler"), (diffusion, type(flow).__name__)):
        with pytest.raises(InputError, match=rf"pipeline\.scheduler='{name}'.*flow matching"):
            with_scheduler(one, PipelineConfig(scheduler=name))
    with pytest.raises(InputError, match=r"pipeline\.scheduler='None'.*UniPC"):
        with_scheduler(flow, PipelineConfig(scheduler="None"))
    with pytest.raises(InputError, match=r"pipeline\.flow_shift=2\.0.*CogVideoXDDIM"):
        with_scheduler(Case("cogvideox_t2v", False).pipeline.scheduler, PipelineConfig(flow_shift=2.0))


@pytest.mark.parametrize(
    ("name", "sides", "frames", "message"),
    [
        ("wan22_i2v", (40, 48), 9, "40 x 48.*multiples of 16"),
        ("wan22_ti2v_i2v", (48, 96), 9, "multiples of 32"),
        ("wan22_i2v", (32, 48), 10, r"frames=10.*4k \+ 1"),
        ("ltx_t2v", (64, 96), 13, r"frames=13.*8k \+ 1"),
        ("cogvideox_t2v", (32, 48), 13, r"frames=13.*8k \+ 1"),
        ("cogvideox_i2v", (32, 48), 9, "64 x 96.*9 frames"),
        ("mochi", (32, 48), 9, r"frames=9.*6k \+ 1"),
        ("hunyuan_t2v", (24, 48), 9, "multiples of 16"),
        ("allegro", (128, 176), 25, r"frames.*25.*24 \+ 16k"),
        ("allegro", (112, 176), 24, r"height.*112.*128"),
    ],
)
def test_sizes_and_frames_that_a_family_does_not_take(name, sides, frames, message):
    with pytest.raises(InputError, match=message):
        check_size(Case(name, False).pipeline, sides, frames)


@pytest.mark.parametrize(("name", "tokens"), [("wan21_i2v", 512), ("skyreels_i2v", 512), ("cogvideox_t2v", 32)])
def test_a_number_of_prompt_tokens_that_the_model_needs(name, tokens):
    with pytest.raises(InputError, match=rf"prompt_tokens=64: expected {tokens}"):
        check_prompts(Case(name, False).pipeline, ["a box"], 64)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("wan22_i2v", {"true_cfg": 3.0}, "true_cfg=3.*set true_cfg to 1"),
        ("wan21_t2v", {"guidance_2": 3.0}, "guidance_2=3.*one transformer"),
        ("hunyuan_i2v_replace", {"guidance": 6.0}, "guidance=6.*no input for guidance"),
    ],
)
def test_guidance_that_a_model_does_not_have(name, settings, message):
    case = Case(name, False)
    if name.startswith("hunyuan"):
        case.pipeline.transformer.register_to_config(guidance_embeds=False)
    case.config = replace(case.config, **settings)
    with pytest.raises(InputError, match=message):
        case.run()


def test_a_model_on_the_hub_that_was_downloaded_is_loaded(tmp_path, monkeypatch):
    """The cache of the Hub: the files of a commit, and the name of the newest one."""
    place = tmp_path / "models--org--wan"
    wan().save_pretrained(place / "snapshots" / "abc123")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = PipelineConfig(path="org/wan")
    assert config.on_hub and config.folder == place / "snapshots" / "abc123"
    assert with_defaults(config).steps == 50


def compiled_for_real(function):
    """torch.compile without the compiler of C++, which not every machine has."""
    return torch._dynamo.optimize("eager")(function)


@pytest.mark.parametrize("how", [functools.partial, pytest.param(compiled_for_real, marks=pytest.mark.docs)])
def test_blocks_that_are_compiled_give_the_same_features(tmp_path, monkeypatch, how):
    """The forward of a block is compiled, not the block: hooks run outside of the compiled code."""
    monkeypatch.setattr(torch, "compile", how)
    wan().save_pretrained(tmp_path / "wan")
    found = []
    for compiled in (False, True):
        case = Case("wan22_i2v", False)
        case.pipeline = load_pipeline(PipelineConfig(path=str(tmp_path / "wan"), compile=compiled))
        case.config = PipelineConfig(steps=2, guidance=1.0, frames=9, prompt_tokens=32)
        with capture(case.pipeline, "all", Pooling("frame")) as cache:
            case.run()
        found.append(cache.features())
        assert ("forward" in vars(next(iter(experts(case.pipeline).values())).blocks[0])) == compiled
    torch.testing.assert_close(*found, atol=1e-5, rtol=0)


def test_offloading_without_a_gpu_and_unknown_attention_are_refused(tmp_path):
    wan().save_pretrained(tmp_path)
    for settings, message in (({"offload": "model"}, "offload=model"), ({"attention": "magic"}, "attention='magic'")):
        with pytest.raises(InputError, match=rf"pipeline\.{message}"):
            load_pipeline(PipelineConfig(path=str(tmp_path), **settings))
