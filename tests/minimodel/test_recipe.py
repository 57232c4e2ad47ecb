"""The recipe at toy size: every stage really trains, and a killed run ends where an unbroken one would."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from itertools import combinations, product

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from safetensors.torch import load_file

from cosprobe.config import AutoencoderConfig, FlowConfig, MiniConfig
from cosprobe.minimodel.accuracy import LearningCurve
from cosprobe.minimodel.autoencoding import (
    AutoencoderTraining,
    ClipBatches,
    build_autoencoder,
    revive,
    to_model_range,
    video_of,
)
from cosprobe.minimodel.encoding import TEXT_TOKENS, build_text, embed, every_prompt, measure_scale
from cosprobe.minimodel.flow_matching import FlowBatches, FlowMatching, LatentClips
from cosprobe.minimodel.recipe import families, train_mini, training_sets
from cosprobe.tasks import FAMILIES, FolderConfig, Maze, with_margin
from cosprobe.tasks.select import COLOURS, PHRASES
from tests.examples.folders import write
from tests.examples.pipelines import wan

TASK = Maze()
CONFIG = MiniConfig(
    autoencoder=AutoencoderConfig(base_dim=4, z_dim=4, dim_mult=[1, 1, 1], stages=[[1, 2, 2], [9, 2, 2]]),
    flow=FlowConfig(stages=[[5, 2], [9, 2]], batch=4, compile=False),
    families=["maze", "select"],
    lengths=[5, 9],
    clips=[12, 8],
    layers=2,
    heads=2,
    head_dim=12,
    ffn=16,
    solve_every=3,
)


def weights(folder):
    return {name: load_file(next((folder / name).glob("*.safetensors"))) for name in ("transformer", "vae")}


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    return every_prompt()


@pytest.mark.slow
def test_a_killed_run_ends_where_an_unbroken_one_would(tmp_path, monkeypatch, prompts):
    monkeypatch.setattr("cosprobe.minimodel.recipe.every_prompt", lambda: prompts)  # drawn once for all runs
    monkeypatch.setattr("cosprobe.minimodel.recipe.LearningCurve", partial(LearningCurve, problems=8))
    tasks = families(CONFIG.families, TASK)
    whole = train_mini(CONFIG, tasks, tmp_path / "whole", "32-true", every=1)
    original = {kind: kind.training_step for kind in (AutoencoderTraining, FlowMatching)}

    for kind in original:  # once in the middle of each stage

        def killed(self, batch, index, kind=kind):
            if self.global_step == 2:
                raise ConnectionError("killed")
            return original[kind](self, batch, index)

        monkeypatch.setattr(kind, "training_step", killed)
        with pytest.raises(ConnectionError):
            train_mini(CONFIG, tasks, tmp_path / "broken", "32-true", every=1)
        monkeypatch.setattr(kind, "training_step", original[kind])
    assert not (tmp_path / "broken" / "pipeline").exists()
    broken = train_mini(CONFIG, tasks, tmp_path / "broken", "32-true", every=1)
    for name, state in weights(whole).items():
        for key, value in weights(broken)[name].items():
            torch.testing.assert_close(value, state[key], msg=f"{name} {key}")
    pipeline = WanImageToVideoPipeline.from_pretrained(broken)
    assert pipeline.transformer.dtype == torch.float32
    assert json.loads((broken / "recipe.json").read_text())["settings"]["clips"] == [12, 8]
    curve = json.loads((broken / "recipe.json").read_text())["curve"]
    assert [(row["step"], row["family"], row["frames"], row["of"]) for row in curve] == [
        (3, "maze", 9, 8), (3, "maze", 9, 8), (3, "select", 9, 8)
    ]  # fmt: skip

    start = {"start": str(whole), "stages": []}
    further = replace(CONFIG, flow=replace(CONFIG.flow, **start), autoencoder=replace(CONFIG.autoencoder, **start))
    again = train_mini(further, tasks, tmp_path / "further", "32-true")
    for name, state in weights(whole).items():  # nothing to do: the start comes out again
        assert all(torch.equal(value, state[key]) for key, value in weights(again)[name].items())
    first, second = (json.loads((folder / "recipe.json").read_text()) for folder in (whole, again))
    assert first.pop("before") == [] and second["before"] == [first]


@torch.no_grad()
def test_idle_channels_are_begun_anew_and_the_others_stay_as_they_are():
    torch.manual_seed(0)
    vae = build_autoencoder(AutoencoderConfig(base_dim=4, z_dim=4, dim_mult=[1, 1, 1])).double()
    assert revive(vae) == []
    vae.register_to_config(latents_std=[1.0, 0.1, 2.0, 0.5])
    vae.post_quant_conv.weight[:, [1, 3]] = 0  # the decoder does not look at the idle ones
    vae.post_quant_conv.bias.zero_()
    clip = torch.rand(1, 3, 5, 32, 32, dtype=torch.float64)
    before = vae.encode(clip).latent_dist
    drawn = vae.decode(before.mean).sample
    assert revive(vae) == [1, 3]
    after = vae.encode(clip).latent_dist
    for name in ("mean", "logvar"):
        torch.testing.assert_close(getattr(after, name)[:, [0, 2]], getattr(before, name)[:, [0, 2]])
    assert (after.logvar[:, [1, 3]] == -4).all() and (after.mean[:, [1, 3]].std(dim=(0, 2, 3, 4)) > 0).all()
    assert (vae.decode(after.mean).sample - drawn).abs().max() > 1e-3
    vae.decoder.conv_in.weight[:, [1, 3]] = 0
    torch.testing.assert_close(vae.decode(after.mean).sample, drawn)


@torch.no_grad()
def test_a_channel_that_carries_nothing_is_not_blown_up(tmp_path):
    vae = build_autoencoder(CONFIG.autoencoder).eval()
    vae.quant_conv.weight[1] *= 1e-6
    measure_scale(vae, [(TASK, TASK.problems("model", 3))], 5, tmp_path / "scale.json")
    deviations = torch.tensor(vae.config["latents_std"])
    assert deviations.argmin() == 1 and deviations[1] == pytest.approx(0.25 * float(deviations.max()))
    videos = torch.stack([to_model_range(video_of(TASK, problem, 5)) for problem in TASK.problems("model", 3)])
    seen = vae.encode(videos).latent_dist.mode().std(dim=(0, 2, 3, 4))
    torch.testing.assert_close(deviations.max(), seen.max())


def clips_of(latent, **given):
    """Clips that hold `latent` and nothing else of interest; the last of two prompts is the empty one."""
    number, _, frames, height, width = latent.shape
    known = {
        "condition": torch.zeros(number, 1, frames, height, width),
        "active": torch.ones(number, frames, height, width, dtype=torch.uint8),
        "text": torch.zeros(number, dtype=torch.int64),
        "prompts": torch.stack([torch.ones(2, 3), torch.zeros(2, 3)]),
    }
    return LatentClips(latent, **(known | given))


def test_batches_depend_on_their_number_alone():
    sets = [(TASK, TASK.problems("model", 6))]
    whole = list(ClipBatches(sets, [5, 9], CONFIG.autoencoder, 0, 0))
    late = list(ClipBatches(sets, [5, 9], CONFIG.autoencoder, 0, 3))
    assert [b.shape[2] for b in whole[:2]] == [1, 1] and {b.shape[2] for b in whole[2:]} <= {5, 9}
    assert len(late) == 1 and torch.equal(late[0], whole[3])

    clips = {frames: clips_of(torch.randn(10, 2, frames // 4 + 1, 1, 1)) for frames in (5, 9)}
    config = FlowConfig(stages=[[5, 3], [9, 9]], batch=4)
    batches = list(FlowBatches(clips, config, 0, 0))
    assert [b["latent"].shape[2] for b in batches[:3]] == [2] * 3 and len(batches) == 12
    assert {b["latent"].shape[2] for b in batches[3:]} == {2, 3}
    for start in (2, 7):
        for again, batch in zip(FlowBatches(clips, config, 0, start), batches[start:], strict=True):
            assert all(torch.equal(again[name], batch[name]) for name in again)
    assert not torch.equal(batches[0]["noise"], batches[1]["noise"])


def test_an_epoch_holds_every_clip_once_whatever_its_length():
    clips = {f: clips_of(f + torch.arange(8.0)[:, None, None, None, None]) for f in (5, 9)}
    seen = {5: [], 9: []}
    for batch in FlowBatches(clips, FlowConfig(stages=[[9, 40]], batch=4), 0, 0):
        first = batch["latent"].flatten()
        seen[int(batch["latent"].min() >= 9) * 4 + 5 if first.max() > 12 or first.min() >= 9 else 5].append(first)
    for frames, drawn in seen.items():
        for pair in zip(drawn[::2], drawn[1::2], strict=False):
            assert sorted(torch.cat(pair).tolist()) == [frames + n for n in range(8)]


def test_half_of_a_stage_is_its_longest_videos_and_the_rest_shorter_ones_alike():
    clips = {frames: clips_of(torch.zeros(4, 1, frames // 4 + 1, 1, 1)) for frames in (17, 5, 9, 13)}
    plan = FlowBatches(clips, FlowConfig(stages=[[5, 7], [13, 4000]], batch=4), 0, 0).plan
    share = {frames: float((plan[7:] == frames).mean()) for frames in clips}
    assert (plan[:7] == 5).all() and share[17] == 0
    assert abs(share[13] - 0.5) < 0.03 and abs(share[5] - 0.25) < 0.03 and abs(share[9] - 0.25) < 0.03


def test_prompts_are_dropped_as_often_as_asked():
    clips = {5: clips_of(torch.zeros(40, 1, 2, 1, 1))}
    batches = list(FlowBatches(clips, FlowConfig(stages=[[5, 100]], batch=40, dropout=0.1), 0, 0))
    empty = torch.cat([batch["prompt"] for batch in batches]).sum((1, 2)) == 0
    assert 0.08 < empty.float().mean() < 0.12


def test_no_problem_is_in_two_sets_and_families_are_weighted():
    config = replace(CONFIG, families=["maze", "maze", "line"], clips=[30, 12])
    sets = training_sets(config, families(config.families, TASK))
    assert [[len(problems) for _, problems in sets[length]] for length in (5, 9)] == [[20, 10], [8, 4]]
    keys = [p.key for pairs in sets.values() for _, problems in pairs for p in problems]
    assert len(set(keys)) == len(keys) == 42 and {p.split for _, problems in sets[5] for p in problems} == {"model"}


def test_mistakes_in_the_recipe_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"experiment\.families.*'mase'.*maze"):
        families(["mase"], TASK)
    for number in range(30):
        write(tmp_path / "set" / str(number), number)
    task = FolderConfig(root=str(tmp_path / "set"), label="parameters.answer").build()
    for chosen in (task, with_margin(task, 96, 96)):
        with pytest.raises(ValueError, match=r"task=folder.*maze"):
            families(["maze"], chosen)
    with pytest.raises(ValueError, match=r"experiment\.clips=\[1\].*lengths=\[5, 9\]"):
        replace(CONFIG, clips=[1])
    with pytest.raises(ValueError, match=r"experiment\.lengths=\[5, 8\].*4k \+ 1.*5"):
        replace(CONFIG, lengths=[5, 8])
    missing = replace(CONFIG, autoencoder=replace(CONFIG.autoencoder, start=str(tmp_path)))
    with pytest.raises(ValueError, match=r"experiment\.autoencoder\.start='.*'.*vae"):
        train_mini(missing, families(["maze"], TASK), tmp_path / "run", "32-true")


def test_a_video_of_another_length_ends_as_the_reference_does():
    problem = TASK.problems("model", 1)[0]
    short = video_of(TASK, problem, 5)
    assert len(short) == 5 and np.array_equal(short[-1], TASK.video(problem)[-1])


@pytest.fixture(scope="module")
def text(prompts):
    """Tokenizer and encoder of every prompt."""
    return build_text(prompts, 0)


@pytest.mark.parametrize("phrase", PHRASES)
def test_a_noun_carries_the_colour_that_stands_before_it(phrase, text):
    """The same words in another order are another prompt: linearly, at the noun itself, for every pair of colours."""
    pairs = list(product(COLOURS, COLOURS))
    prompts = [phrase.format(colour=one, shape="dash", box=other) for one, other in pairs]
    embedded = embed(prompts, *text)
    words = phrase.format(colour="red", shape="dash", box="red").split()
    for noun, which in (("dash", 0), ("box", 1)):
        at_noun = embedded[:, words.index(noun)].numpy()
        colour = np.array([COLOURS.index(pair[which]) for pair in pairs])
        means = np.stack([at_noun[colour == c].mean(0) for c in range(len(COLOURS))])
        spread = max(np.linalg.norm(at_noun[colour == c] - means[c], axis=1).max() for c in range(len(COLOURS)))
        apart = min(np.linalg.norm(means[a] - means[b]) for a, b in combinations(range(len(COLOURS)), 2))
        assert apart > 2 * spread, (noun, apart, spread)
        assert apart > 0.2 * np.linalg.norm(means, axis=1).mean()


@pytest.mark.slow
def test_every_word_of_every_family_is_known(text, prompts):
    tokenizer, _ = text
    assert len(prompts) > 100
    unseen = [p.prompt for task in families(FAMILIES, TASK).values() for p in task.problems("test", 100)]
    for text in unseen:
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids and len(ids) <= TEXT_TOKENS


def test_clips_are_scaled_to_the_models_range():
    frames = np.zeros((2, 5, 8, 8, 3), dtype=np.uint8)
    frames[1, 2, 3, 4, 1] = 255
    clips = to_model_range(frames)
    assert (
        clips.shape == (2, 3, 5, 8, 8)
        and clips.min() == -1
        and clips[1, 1, 2, 3, 4] == 1
        and clips.sum() == 2 - clips.numel()
    )


def test_embeddings_are_the_pipelines_own():
    pipeline = wan()
    prompt = TASK.problems("model", 1)[0].prompt
    ours = embed([prompt, ""], *build_text([prompt, ""], seed=0))
    theirs, _ = pipeline.encode_prompt([prompt, ""], do_classifier_free_guidance=False, max_sequence_length=TEXT_TOKENS)
    assert not torch.allclose(ours[0], ours[1])
    pipeline.tokenizer, pipeline.text_encoder = build_text([prompt, ""], seed=0)
    theirs, _ = pipeline.encode_prompt([prompt, ""], do_classifier_free_guidance=False, max_sequence_length=TEXT_TOKENS)
    torch.testing.assert_close(ours, theirs)


class Exact(torch.nn.Module):
    """A transformer that knows the velocity of one clip."""

    def __init__(self, clean):
        super().__init__()
        self.clean, self.scale = clean, torch.nn.Parameter(torch.ones(()))

    def forward(self, noisy, timestep, prompt, return_dict):
        sigma = (timestep / 1000)[:, None, None, None, None]
        latent = noisy[:, : self.clean.shape[1]]
        return (self.scale * (latent - self.clean) / sigma,)


def test_the_loss_is_zero_for_the_true_velocity_and_counts_every_frame():
    clean = torch.randn(1, 3, 2, 4, 4)
    active = torch.zeros(4, 2, 4, 4, dtype=torch.uint8)
    active[:, :, :2] = 1
    clips = clips_of(clean.expand(4, -1, -1, -1, -1), active=active)
    config = FlowConfig(stages=[[5, 1]], batch=4)
    batch = next(iter(FlowBatches({5: clips}, config, 0, 0)))

    def loss(frame, row):
        wrong = torch.zeros(2, 4, 4)
        wrong[frame, row] = 1.0
        return float(FlowMatching(Exact(clean + wrong), {5: clips}, config, seed=0).loss(batch))

    assert FlowMatching(Exact(clean), {5: clips}, config, seed=0).loss(batch) < 1e-6
    # frame 0 counts once wherever the mistake is; in later frames what may change counts five times
    assert loss(0, 0) == pytest.approx(loss(0, 3), rel=1e-4) == pytest.approx(loss(1, 3), rel=1e-4)
    assert loss(1, 0) == pytest.approx(5 * loss(1, 3), rel=1e-4)
