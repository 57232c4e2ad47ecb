from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline

from cosprobe.activations import capture
from cosprobe.config import PipelineConfig
from cosprobe.errors import InputError
from cosprobe.minimodel.encoding import encode_condition
from cosprobe.models import architecture
from cosprobe.models.loading import load_pipeline
from cosprobe.models.pipelines import decode, experts, sample
from tests.examples.pipelines import CONFIG, PROMPT, save_wan, wan

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "wan"
    save_wan(path)
    return path


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "fp8"}, r"pipeline\.dtype='fp8'.*float32, bfloat16, float16"),
        ({"steps": -1}, r"pipeline\.steps=-1.*0"),
        ({"guidance": 0.5}, r"pipeline\.guidance=0\.5.*1"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        PipelineConfig(**settings)


def test_a_missing_folder_and_one_that_is_no_pipeline(tmp_path, folder):
    with pytest.raises(ValueError, match=r"pipeline\.path='.*none'.*model_index\.json"):
        load_pipeline(PipelineConfig(path=str(tmp_path / "none")))
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    shutil.rmtree(broken / "transformer")
    with pytest.raises(ValueError, match=r"pipeline\.path='.*/broken'.*transformer/") as caught:
        load_pipeline(PipelineConfig(path=str(broken)))
    assert "\n" not in str(caught.value)
    cut = tmp_path / "cut"
    shutil.copytree(folder, cut)
    weights = next((cut / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"pipeline\.path='.*/cut'.*\(.+\)"):
        load_pipeline(PipelineConfig(path=str(cut)))
    other = tmp_path / "other"
    other.mkdir()
    (other / "model_index.json").write_text(json.dumps({"_class_name": "NoSuchPipeline"}))
    with pytest.raises(ValueError, match=r"pipeline\.path='.*/other'.*NoSuchPipeline"):
        load_pipeline(PipelineConfig(path=str(other)))


def test_weights_that_are_not_safetensors_are_not_loaded(tmp_path, folder):
    pickled = tmp_path / "pickled"
    shutil.copytree(folder, pickled)
    weights = next((pickled / "transformer").glob("*.safetensors"))
    torch.save({}, weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(ValueError, match=r"pipeline\.path='.*/pickled'.*safetensors"):
        load_pipeline(PipelineConfig(path=str(pickled)))


def test_loaded_pipelines_are_frozen_and_in_eval_mode(folder):
    pipeline = load_pipeline(PipelineConfig(path=str(folder)))
    for part in (pipeline.transformer, pipeline.vae, pipeline.text_encoder):
        assert not part.training and not any(p.requires_grad for p in part.parameters())


def test_a_prompt_that_would_be_cut_off_is_refused():
    with pytest.raises(ValueError, match=r"'draw draw.*41 tokens.*32.*pipeline\.prompt_tokens"):
        sample(wan(), CONFIG, IMAGES[:1], ["draw " * 40], [0])


def test_a_batch_of_different_problems_equals_single_runs():
    pipeline = wan()
    together = sample(pipeline, CONFIG, IMAGES, [PROMPT] * 2, [1, 2])
    for i in range(2):
        alone = sample(pipeline, CONFIG, IMAGES[i : i + 1], [PROMPT], [i + 1])
        np.testing.assert_allclose(together[i], alone[0], atol=1e-5)
    assert abs(together[0] - together[1]).max() > 0.01


def test_one_problem_equals_the_plain_pipeline():
    pipeline = wan()
    plain = pipeline(
        image=IMAGES[:1], prompt=PROMPT, height=32, width=32, num_frames=5, num_inference_steps=3, guidance_scale=1.0,
        max_sequence_length=32, generator=torch.Generator().manual_seed(7), output_type="np",
    ).frames  # fmt: skip
    assert np.array_equal(sample(pipeline, CONFIG, IMAGES[:1], [PROMPT], [7]), plain)


def test_batched_images_is_undone():
    pipeline = wan()
    with pytest.raises(ZeroDivisionError), architecture(pipeline).batched_images(pipeline):
        assert "prepare_latents" in vars(pipeline) and "encode" in vars(pipeline.vae)
        raise ZeroDivisionError
    assert "prepare_latents" not in vars(pipeline) and "encode" not in vars(pipeline.vae)


def test_a_batch_of_images_is_encoded_once(monkeypatch):
    pipeline, encoded = wan(), []
    encode = pipeline.vae.encode

    def counted(videos):
        encoded.append(len(videos))
        return encode(videos)

    monkeypatch.setattr(pipeline.vae, "encode", counted)
    sample(pipeline, CONFIG, IMAGES, [PROMPT] * 2, [1, 2])
    assert encoded == [2]
    runs = sample(pipeline, CONFIG, IMAGES.repeat_interleave(3, dim=0), [PROMPT] * 6, range(6))  # three seeds of each
    assert encoded == [2, 2]
    alone = sample(pipeline, CONFIG, IMAGES[1:], [PROMPT], [4])
    np.testing.assert_allclose(runs[4], alone[0], atol=1e-5)
    assert pipeline.vae.encode is counted


def test_a_pipeline_that_encodes_other_than_expected_is_refused(monkeypatch):
    pipeline = wan()
    original = pipeline.prepare_latents
    monkeypatch.setattr(pipeline, "prepare_latents", lambda *a: (original(*a)[0], original(*a)[1][:1]))
    with pytest.raises(RuntimeError, match="1 of 2 images"):
        sample(pipeline, CONFIG, IMAGES, [PROMPT] * 2, [1, 2])


def test_the_recipes_condition_is_the_pipelines():
    pipeline = wan()
    image = IMAGES[:1] * 2 - 1
    arguments = (image, 1, 4, 32, 32, 5, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(0))
    _, condition = pipeline.prepare_latents(*arguments)
    torch.testing.assert_close(encode_condition(pipeline.vae, image, 5), condition, atol=1e-6, rtol=0)


def test_experts_are_named():
    assert list(experts(wan())) == ["only"] and list(experts(wan(2))) == ["high", "low"]


def test_the_shipped_model_is_a_plain_diffusers_folder(tmp_path, monkeypatch):
    folder = PipelineConfig().folder
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}
    pipeline = WanImageToVideoPipeline.from_pretrained(folder)
    assert type(pipeline.transformer).__name__ == "WanTransformer3DModel"
    assert type(pipeline.text_encoder).__name__ == "UMT5EncoderModel"
    assert type(pipeline.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    card = (Path(folder) / "README.md").read_text()
    assert all(word in card for word in ("one_exit", "rooms", "seed", "flow matching"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mini").mkdir()  # a folder that happens to stand here is not taken for it
    assert PipelineConfig().folder == PipelineConfig(path="mini").folder == folder
    assert [PipelineConfig(path=path).folder for path in ("./mini", "four")] == [Path("mini"), Path("four")]


@pytest.mark.parametrize(("experts", "guidance", "multistep"), [(1, 1.0, False), (2, 3.0, False), (1, 3.0, True)])
def test_samples_can_leave_a_running_batch(experts, guidance, multistep):
    """Who stays ends as if alone; nothing is computed for who left."""
    pipeline, config = wan(experts), replace(CONFIG, steps=4, guidance=guidance)
    if multistep:  # it remembers earlier steps of every sample
        pipeline.scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
    four, sizes = torch.cat([IMAGES, 1 - IMAGES]), []
    models = [pipeline.transformer, pipeline.transformer_2][:experts]
    hooks = [m.register_forward_hook(lambda model, args, output: sizes.append(len(output[0]))) for m in models]
    video = sample(
        pipeline, config, four, [PROMPT] * 4, [1, 2, 3, 4], filter_batch=lambda step: {1: [1, 3], 2: [1]}.get(step)
    )
    for hook in hooks:
        hook.remove()
    alone = sample(pipeline, config, four[3:], [PROMPT], [4])
    np.testing.assert_allclose(video, alone, atol=1e-5)
    branches = 1 if guidance == 1 else 2
    assert sizes == [size for size in (4, 4, 2, 1) for _ in range(branches)]


def test_a_picture_of_any_kind_gives_the_same_video(folder):
    pipeline = load_pipeline(folder)
    pixels = (IMAGES * 255).round().to(torch.uint8)
    expected = sample(pipeline, CONFIG, pixels.float() / 255, [PROMPT] * 2, [0, 1])
    for images in (pixels, [np.asarray(p.permute(1, 2, 0)) for p in pixels]):
        np.testing.assert_array_equal(sample(pipeline, CONFIG, images, [PROMPT] * 2, [0, 1]), expected)


@pytest.mark.parametrize(
    ("images", "prompts", "seeds", "message"),
    [
        (IMAGES * 255, [PROMPT] * 2, [0, 1], r"^images: values from 0\.\d+ to 25\d.*divide by 255"),
        (IMAGES, [PROMPT], [0, 1], r"^prompts: 1 entries for 2 images; expected one for each image"),
        (IMAGES, PROMPT, [0, 1], r"^prompts='draw.*expected a list"),
        (IMAGES, [PROMPT] * 2, [0], r"^seeds: 1 entries for 2 images"),
        (IMAGES[..., :20], [PROMPT] * 2, [0, 1], r"^images: 32 x 20 pixels, expected multiples of 16"),
    ],
)
def test_what_does_not_fit_together_is_refused(images, prompts, seeds, message):
    with pytest.raises(InputError, match=message):
        sample(wan(), CONFIG, images, prompts, seeds)


@pytest.mark.parametrize("frames", [1, 4, 5, 12, 15])
def test_frames_that_diffusers_would_round_are_refused(frames):
    pipeline = wan()
    if frames % 4 == 1:
        assert sample(pipeline, replace(CONFIG, frames=frames), IMAGES[:1], [PROMPT], [0]).shape[1] == frames
    else:
        with pytest.raises(InputError, match=rf"pipeline\.frames={frames}: expected 4k \+ 1"):
            sample(pipeline, replace(CONFIG, frames=frames), IMAGES[:1], [PROMPT], [0])


def test_a_video_that_is_not_finite_is_refused():
    pipeline = wan()
    pipeline.vae.decoder.conv_out.bias.data[0] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        sample(pipeline, CONFIG, IMAGES[:1], [PROMPT], [0])
    with pytest.raises(InputError, match="NaN"):
        decode(pipeline, torch.zeros(1, 4, 2, 4, 4), CONFIG.frames)
    pipeline.transformer.proj_out.bias.data[0] = float("inf")
    with pytest.raises(InputError, match="latents with NaN"):
        sample(pipeline, CONFIG, IMAGES[:1], [PROMPT], [0], output_type="latent")


def test_a_video_of_another_size_than_asked_for_is_refused(monkeypatch):
    pipeline = wan()
    shorter = pipeline.video_processor.postprocess_video
    monkeypatch.setattr(
        pipeline.video_processor, "postprocess_video", lambda video, **given: shorter(video, **given)[:, 1:]
    )
    with pytest.raises(InputError, match=r"4 frames of 32 x 32 pixels, expected 5 frames"):
        sample(pipeline, CONFIG, IMAGES[:1], [PROMPT], [0])


def test_an_error_inside_the_pipeline_is_one_line_and_one_of_ours_stays():
    pipeline = wan()
    pipeline.vae.register_to_config(latents_mean=[])
    with pytest.raises(InputError, match=r"^WanImageToVideoPipeline failed \(RuntimeError: shape.*configuration"):
        sample(pipeline, CONFIG, IMAGES[:1], [PROMPT], [0])
    pipeline = wan()
    with (
        pytest.raises(RuntimeError, match="ran twice at step 0"),
        capture(pipeline, ["0"]),
    ):
        sample(pipeline, replace(CONFIG, steps=2), IMAGES[:1], [PROMPT], [0])
        sample(pipeline, replace(CONFIG, steps=2), IMAGES[:1], [PROMPT], [0])
