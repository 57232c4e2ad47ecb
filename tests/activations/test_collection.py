from __future__ import annotations

import json
import re
from contextlib import contextmanager
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cosprobe.activations import images
from cosprobe.activations.capture import capture
from cosprobe.activations.collection import (
    FORMAT,
    NOT_DECODED,
    UNTRAINED,
    StoredSamples,
    StoreSettings,
    collect,
    find_store,
    input_parts,
    store_bytes,
    watch,
)
from cosprobe.activations.dataset import load_samples
from cosprobe.activations.pooling import Pooling
from cosprobe.activations.sampler import Sampler
from cosprobe.activations.store import ActivationStore
from cosprobe.config import CaptureConfig, PipelineConfig, TrainerConfig, decode_steps
from cosprobe.errors import InputError
from cosprobe.models import TokenGrid
from cosprobe.models.pipelines import sample
from cosprobe.monitoring import ResourceMonitor, build_logger
from cosprobe.tasks import HideConfig, Maze, MazeConfig, Target
from cosprobe.tasks.samples import draw_samples, fresh_problems, noise_seed
from tests.examples.pipelines import save_wan, wan
from tests.examples.stores import collected

PROBE = CaptureConfig(layers="0,2", steps="all", pooling="region", frames=False, decode="auto", random_weights=10)
TASK = MazeConfig(problems=20, frames=5)
DRAWN = draw_samples(TASK.build(), TASK, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "wan"
    save_wan(path)
    return path


@pytest.fixture(scope="module")
def config(folder):
    return PipelineConfig(path=str(folder), steps=3, frames=5, batch=8)


@pytest.fixture(scope="module")
def sampler(config):
    return Sampler(wan(), config, TASK.build())


@pytest.fixture(scope="module")
def settings(config):
    return StoreSettings.of(config, TASK, PROBE, 0)


@pytest.fixture(scope="module")
def stored(sampler, settings, tmp_path_factory):
    return collected(sampler, DRAWN, settings, tmp_path_factory.mktemp("runs") / "first")


@pytest.fixture(scope="module")
def store(stored):
    return stored.store


@pytest.mark.slow
def test_problems_are_shared_out_and_the_seeds_of_one_stay_together():
    drawn = draw_samples(TASK.build(), MazeConfig(problems=40, seeds=2), seed=0)
    counts = {}
    for s in drawn:
        counts[s.problem.split] = counts.get(s.problem.split, 0) + 1
    assert counts == {"train": 40, "validation": 16, "test": 24}
    assert len({s.seed for s in drawn}) == 80
    owner = {}
    for s in drawn:
        assert owner.setdefault(s.problem.key, s.problem.split) == s.problem.split


@pytest.mark.slow
@pytest.mark.parametrize("config", [MazeConfig(problems=30, frames=5), HideConfig(problems=30, frames=9)])
@pytest.mark.parametrize("split", ["validation", "test"])
def test_fresh_problems_are_none_the_run_has_seen_and_begin_where_it_ended(config, split):
    task = config.build()
    seen = {s.problem.key for s in draw_samples(task, config, 0) if s.problem.split == split}
    assert len(seen) == {"validation": 6, "test": 9}[split]
    fresh = fresh_problems(task, split, 30, 5, task.kinds[::-1])  # in whatever order they are asked for
    assert len(fresh) == 5 and not seen & {p.key for p in fresh}
    assert [p.kind for p in fresh] == [task.kinds[i % len(task.kinds)] for i in range(5)]
    for kind in task.kinds:
        alone = fresh_problems(task, split, 30, 3, [kind])
        passed = {p.key for p in task.problems(split, 20, kind) if p.index < alone[0].index}
        assert [p.kind for p in alone] == [kind] * 3 and not seen & {p.key for p in alone}
        assert len(passed - seen) <= 1  # of an odd number by turns, one kind has one fewer


def test_a_noise_seed_depends_on_seed_problem_and_repeat_only():
    problem = TASK.build().problems("train", 1)[0]
    assert noise_seed(problem, 0, 0) == noise_seed(TASK.build().problems("train", 9)[0], 0, 0)
    assert len({noise_seed(problem, which, seed) for which in range(3) for seed in range(3)}) == 9


def test_at_most_five_decodes_the_last_step_among_them():
    assert decode_steps("auto", 20) == (0, 2, 5, 10, 19)
    for total in range(1, 60):
        steps = decode_steps("auto", total)
        assert len(steps) <= 5 and steps[0] == 0 and steps[-1] == total - 1
    assert decode_steps("1,3", 4) == (1, 3)
    with pytest.raises(ValueError, match=r"probe\.decode='7'.*\b0\b.*\b3\b"):
        decode_steps("7", 4)


def test_the_announced_size_is_the_size_on_disk(sampler, store):
    tensors = store.read()[0] | store.read(UNTRAINED)[0]
    both = [tensors["features"], tensors["untrained.features"]]
    assert [len(features) for features in both] == [20, 10]
    inputs = [value for name, value in tensors.items() if name.startswith("input.") and name != "input.prompt.whole"]
    assert len(inputs) == 2 * 5  # noise, first frame, embed, x_t and x0-hat, in regions and over the whole frame
    size = sum(values.numel() * values.element_size() for values in (*both, *inputs))
    assert size == store_bytes(sampler, PROBE, 20, 10)


@pytest.mark.parametrize(
    ("pooling", "frames", "guidance"),
    [("clip", False, 1.0), ("grid", False, 3.0), ("region", True, 3.0), ("token", False, 1.0)],
)
def test_the_announced_size_follows_pooling_and_guidance(sampler, tmp_path, pooling, frames, guidance):
    probe = replace(PROBE, pooling=pooling, frames=frames, steps="0,2", random_weights=0)
    guided = replace(sampler, config=replace(sampler.config, guidance=guidance))
    settings = StoreSettings.of(guided.config, TASK, probe, 0)
    tensors = collected(guided, DRAWN[:2], settings, tmp_path / "run").store.read()[0]
    kept = [v for name, v in tensors.items() if name == "features" or name.startswith("input.")]
    size = sum(values.numel() * values.element_size() for values in kept) - tensors["input.prompt.whole"].numel() * 4
    assert size == store_bytes(guided, probe, 2)


@pytest.mark.parametrize(
    ("pooling", "channels", "parts"),
    [
        (Pooling("clip"), 64, 16),
        (Pooling("frame"), 5120, 1),
        (Pooling("grid"), 5120, 16),  # the cells of the probe, however many columns they make
        (Pooling("region", boxes=[[(0.0, 0.0, 1.0, 1.0)] * 36]), 65, 9 + 36),
        (Pooling("token"), 64, 16 + 12),
    ],
)
def test_an_input_is_kept_in_regions_and_cells(pooling, channels, parts):
    assert input_parts(pooling, channels, TokenGrid(2, 3, 4)) == parts


def test_what_is_stored_is_what_capture_gives(sampler, store, stored):
    samples, inputs, experts = load_samples(stored)
    assert experts == ["only"] * 3
    model, task = sampler.model, sampler.task
    drawn = DRAWN[8:16]
    problems = [s.problem for s in drawn]
    with capture(model, ["2"], Pooling("region", boxes=[p.regions for p in problems]), "1", inputs=True) as cache:
        video = sample(
            model, sampler.config, images(task, problems), [p.prompt for p in problems], [s.seed for s in drawn]
        )
    cell = next(i for i, c in enumerate(samples.cells) if (c.step, c.layer) == (1, 2))
    assert torch.equal(samples.features[8:16, cell], cache.features()[:, 0, 0, 0, 0])
    for name, values in cache.input_features().items():
        source, part = name.split(".")
        stored = getattr(inputs[source], part)[8:16]
        at = slice(1, 2) if stored.shape[1] == 3 else slice(0, 1)  # step 1, or all there is
        assert torch.equal(stored[:, at], values), name
    assert {cell.layer for cell in samples.cells} == {0, 2}  # no input is among what probes are fitted to
    parsed = [task.parse(p, clip) for p, clip in zip(problems, video, strict=True)]
    answers, scores = [-1 if one.answer is None else one.answer for one in parsed], [one.scores for one in parsed]
    assert samples.model_answer[8:16].tolist() == answers
    np.testing.assert_allclose(samples.scores["final"][8:16], scores, atol=1e-6)
    np.testing.assert_allclose(samples.scores["x0_scores"][8:16, -1], scores, atol=1e-6)
    x0_answer = store.read()[0]["x0_answer"]
    assert x0_answer[8:16, -1].tolist() == answers
    assert torch.equal(x0_answer == NOT_DECODED, torch.from_numpy(np.isnan(samples.scores["x0_scores"]).all(axis=2)))


def test_labels_belong_to_their_kinds(store):
    samples, _, _ = load_samples(store)  # a store needs nothing else
    one_exit = samples.kinds == "one_exit"
    assert (samples.labels["answer"].numpy()[one_exit] >= 0).all() and (
        samples.labels["answer"].numpy()[~one_exit] < 0
    ).all()
    assert (samples.labels["model_answer"].numpy()[one_exit] < 0).all()
    assert samples.labels["model_answer"].numpy()[~one_exit].tolist() == samples.model_answer[~one_exit].tolist()
    problems = [s.problem for s in DRAWN]
    assert samples.labels["corridors"].tolist() == [list(p.labels["corridors"]) for p in problems]
    assert samples.keys.tolist() == [p.key[:15] for p in problems]


@pytest.mark.slow
def test_a_second_call_reuses_the_store_and_a_third_mends_it(sampler, settings, store, monkeypatch):
    before = store.read()[0]["features"]
    with no_sampling(monkeypatch):
        again = collected(sampler, DRAWN, settings, store.folder.parent)
    assert again.store == store
    sorted(store.folder.glob("shard-*"))[1].unlink()
    mended = collected(sampler, DRAWN, settings, store.folder.parent)
    assert torch.equal(mended.store.read()[0]["features"], before)


@contextmanager
def no_sampling(monkeypatch):
    def refuse(*arguments, **named):
        raise AssertionError("sampled again")

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "__call__", refuse)
        yield


def test_a_run_that_needs_less_reads_the_store_of_another(sampler, config, settings, store, stored, monkeypatch):
    """Fewer layers and steps, another folder: no problem is drawn, nothing is sampled."""
    less = replace(PROBE, layers="2", steps="1,2", decode="2", random_weights=0)
    with no_sampling(monkeypatch):
        other = StoreSettings.of(config, TASK, less, 0)
        found = find_store(other, sampler.depth, store.folder.parent.parent / "second" / "store")
        part = collect(sampler, pytest.fail, other, found)
    assert part.store.folder == store.folder and not (store.folder.parent.parent / "second").exists()
    (samples, inputs, experts), (whole, whole_inputs, _) = load_samples(part), load_samples(stored)
    assert [(c.step, c.layer) for c in samples.cells] == [(1, 2), (2, 2)] and experts == ["only"] * 2
    at = [whole.cells.index(cell) for cell in samples.cells]
    assert torch.equal(samples.features[:], whole.features[:, at])
    for name, source in inputs.items():
        expected = whole_inputs[name].whole[:]
        assert torch.equal(source.whole[:], expected if expected.shape[1] == 1 else expected[:, 1:]), name
    assert np.isnan(samples.scores["x0_scores"][:, :2]).all()
    np.testing.assert_array_equal(samples.scores["x0_scores"][:, 2], whole.scores["x0_scores"][:, 2])


def test_a_run_with_more_problems_samples_only_the_new_ones(sampler, config, tmp_path):
    def run(problems, folder, seed=0):
        task, seen = MazeConfig(problems=problems, frames=5), []

        class Watching(Sampler):
            def __call__(self, samples, **overrides):
                seen.extend(sample.name for sample in samples)
                return super().__call__(samples, **overrides)

        settings = StoreSettings.of(config, task, PROBE, seed)
        drawn = draw_samples(task.build(), task, seed)
        watching = Watching(sampler.model, sampler.config, sampler.task, sampler.trainer)
        return collected(watching, drawn, settings, tmp_path / folder), seen, [sample.name for sample in drawn]

    few, seen, first = run(10, "few")
    assert seen == first
    before = few.store.read(names=first)[0]["features"]
    more, seen, names = run(15, "more")
    assert seen == [name for name in names if name not in first] and more.store == few.store
    assert list(more.table.names) == names
    values, _, _ = load_samples(more)
    assert torch.equal(more.store.read(names=first)[0]["features"], before) and len(values) == 15
    fresh, _, _ = run(15, "another/alone")
    torch.testing.assert_close(values.features[:], load_samples(fresh)[0].features[:], rtol=1e-4, atol=1e-5)
    again, seen, _ = run(10, "few")
    assert seen == [] and torch.equal(load_samples(again)[0].features[:], load_samples(few)[0].features[:])
    _, seen, names = run(20, "seed", seed=1)
    assert seen == names  # other noise is another store


def test_other_versions_of_libraries_are_a_warning_and_the_store_is_read(sampler, settings, stored, capsys):
    older = replace(settings, versions=settings.versions | {"torch": "1.0"})
    assert older.identity == settings.identity
    again = collected(sampler, DRAWN, older, stored.store.folder.parent)
    said, torch_now = " ".join(capsys.readouterr().out.split()), re.escape(settings.versions["torch"])
    assert again.store == stored.store and "re-using them" in said
    assert re.search(rf'warning: .* was sampled with torch "{torch_now}", now it is "1\.0"', said)


def test_another_target_needs_a_table_and_no_sampling(sampler, settings, stored, monkeypatch):
    class WithParity(Maze):
        """Mazes with one more target: whether the number of a problem is odd."""

        @property
        def targets(self):
            return (*super().targets, Target("odd", 2, "problem", "control", self.kinds))

        def problems(self, *arguments):
            found = super().problems(*arguments)
            return [replace(p, labels=p.labels | {"odd": p.index % 2}) for p in found]

    task = WithParity(frames=5)
    with no_sampling(monkeypatch):
        drawn = draw_samples(task, TASK, 0)
        more = collected(replace(sampler, task=task), drawn, settings, stored.store.folder.parent)
    samples, _, _ = load_samples(more)
    assert more.store == stored.store and more.table.names == stored.table.names
    assert samples.labels["odd"].tolist() == [s.problem.index % 2 for s in drawn]
    assert torch.equal(samples.features[:], load_samples(stored)[0].features[:])
    assert "odd" not in load_samples(stored)[0].labels


def test_samples_that_lack_random_weights_are_sampled_again(sampler, config, settings, tmp_path):
    without = collected(
        sampler, DRAWN, StoreSettings.of(config, TASK, replace(PROBE, random_weights=0), 0), tmp_path / "a"
    )
    before = load_samples(without)[0].features[:]
    stored = collected(sampler, DRAWN, settings, tmp_path / "b")
    assert stored.store == without.store
    few = [stored.table.names[i] for i in stored.few]
    assert len(few) == 10 and stored.store.names(UNTRAINED) == few
    assert torch.equal(load_samples(stored)[0].features[:], before)  # of the first time


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"layers": "0,1"}, "probe.layers"), ({"decode": "0", "steps": "0"}, None), ({"decode": "1,2"}, "probe.decode")],
)
def test_a_store_of_the_run_that_has_too_little_is_refused_and_one_of_another_run_is_not_used(
    sampler, config, store, tmp_path, changes, named
):
    base = replace(PROBE, decode="0,2")
    own = collected(
        sampler, DRAWN[:2], StoreSettings.of(config, TASK, replace(base, random_weights=0), 0), tmp_path / "a"
    )
    other = StoreSettings.of(config, TASK, replace(base, random_weights=0, **changes), 0)
    if named is None:
        assert find_store(other, sampler.depth, tmp_path / "a" / "store") == own.store
        return
    with pytest.raises(InputError, match=rf"{re.escape(named)}='.*{re.escape(named)}='.*run_dir"):
        find_store(other, sampler.depth, tmp_path / "a" / "store")
    assert find_store(other, sampler.depth, tmp_path / "b" / "store").folder == tmp_path / "b" / "store"


def test_a_store_can_be_named(sampler, config, settings, tmp_path):
    named = collected(sampler, DRAWN[:2], settings, tmp_path / "a", named=str(tmp_path / "shared"))
    assert named.store.folder == tmp_path / "shared" and not (tmp_path / "a").exists()
    other = StoreSettings.of(replace(config, guidance=2.0), TASK, PROBE, 0)
    with pytest.raises(InputError, match=r"shared.*pipeline\.guidance=1\.0.*pipeline\.guidance=2\.0"):
        find_store(other, sampler.depth, tmp_path / "b" / "store", str(tmp_path / "shared"))


def test_what_a_result_reads_is_written_beside_it(stored, tmp_path):
    folder = tmp_path / "result"
    folder.mkdir()
    stored.save(folder)
    again = StoredSamples.load(folder)
    assert again.store.folder.resolve() == stored.store.folder and again.table.names == stored.table.names
    assert (again.layers, again.steps, again.few) == (stored.layers, stored.steps, stored.few)
    with pytest.raises(InputError, match=r"nothing/activations\.json.*train\.py"):
        StoredSamples.load(tmp_path / "nothing")


@pytest.mark.slow
def test_every_sampled_batch_is_logged_at_its_samples(sampler, settings, tmp_path):
    def logged() -> list[int]:
        events = EventAccumulator(str(tmp_path / "sampling")).Reload()
        assert {tag.split("/")[0] for tag in events.Tags()["scalars"]} == {"speed and memory"}
        speed = events.Scalars("speed and memory/sampling: samples per second")
        assert all(e.value > 0 for e in speed)
        return [e.step for e in speed]

    def run() -> None:
        monitor = ResourceMonitor(build_logger(TrainerConfig(), tmp_path / "sampling"), "sampling")
        collected(sampler, DRAWN, settings, tmp_path, monitor)

    run()
    assert logged() == [8, 16, 20]
    run()  # nothing is sampled
    assert logged() == [8, 16, 20]
    store = ActivationStore.open(tmp_path / "store")
    store.path({"": [s.name for s in DRAWN[16:]], UNTRAINED: [s.name for s in DRAWN[16:17]]}).unlink()
    run()
    assert logged() == [20]


def test_other_settings_do_not_share_a_folder(sampler, store):
    other = MazeConfig(problems=20, frames=5, rooms=[4])
    drawn, changed = draw_samples(other.build(), other, 0), replace(sampler, task=other.build())
    settings = StoreSettings.of(sampler.config, other, PROBE, 0)
    with pytest.raises(ValueError, match=r"task\.rooms=\[4, 5\].*task\.rooms=\[4\]"):
        collected(changed, drawn, settings, store.folder.parent)


def test_everything_that_shapes_activations_is_in_the_fingerprint_and_nothing_else(config, settings, tmp_path):
    shaping = [
        StoreSettings.of(config, MazeConfig(problems=20, frames=5, rooms=[4]), PROBE, 0),
        StoreSettings.of(config, TASK, replace(PROBE, pooling="grid"), 0),
        StoreSettings.of(config, TASK, PROBE, 1),
        StoreSettings.of(replace(config, steps=4), TASK, PROBE, 0),
        StoreSettings.of(replace(config, batch=4), TASK, PROBE, 0),
    ]
    others = [
        StoreSettings.of(config, MazeConfig(problems=21, frames=5, seeds=2), PROBE, 0),
        StoreSettings.of(config, TASK, replace(PROBE, layers="0", steps="1", decode="1", random_weights=0), 0),
    ]
    assert all(other != settings for other in (*shaping, *others))
    prints = [ActivationStore(tmp_path, one.identity).fingerprint for one in (settings, *shaping)]
    assert len(set(prints)) == 6
    assert {ActivationStore(tmp_path, one.identity).fingerprint for one in others} == {prints[0]}
    assert StoreSettings.of(replace(config, name="another"), TASK, PROBE, 0) == settings


def test_settings_are_read_back_and_those_of_another_format_are_refused(settings):
    saved = json.loads(json.dumps(asdict(settings)))
    assert StoreSettings.from_json(saved) == settings
    for other, found in ((saved | {"format": 1}, 1), ({"model": "none"}, None)):
        with pytest.raises(ValueError, match=rf"format.*\b{found}\b.*\b{FORMAT}\b.*train\.py"):
            StoreSettings.from_json(other)


def test_too_few_problems():
    with pytest.raises(ValueError, match=r"task\.problems=5.*task\.seeds=1.*\b10\b"):
        draw_samples(TASK.build(), MazeConfig(problems=5), 0)
    with pytest.raises(ValueError, match=r"task\.problems=1\b.*task\.seeds=1\b.*\b10\b"):
        draw_samples(TASK.build(), MazeConfig(problems=1), 0)


def test_watch_shows_the_finished_video_at_the_last_step(sampler):
    drawn = DRAWN[:2]
    watched = watch(sampler, drawn, (0, 2))
    problems = [s.problem for s in drawn]
    prompts, seeds = [p.prompt for p in problems], [s.seed for s in drawn]
    video = sample(sampler.model, sampler.config, images(sampler.task, problems), prompts, seeds)
    assert watched.shape == (2, 2, 5, 64, 64, 3)
    np.testing.assert_allclose(watched[:, 1], video, atol=1e-4)
    assert abs(watched[:, 0] - video).max() > 0.01


@pytest.mark.parametrize("changes", [{"prompt_tokens": 2}, {"negative_prompt": "no " * 40, "guidance": 2.0}])
def test_a_prompt_that_is_too_long_is_named_before_anything_is_written(sampler, tmp_path, changes):
    changed = replace(sampler, config=replace(sampler.config, **changes))
    settings = StoreSettings.of(changed.config, MazeConfig(), PROBE, 0)
    with pytest.raises(InputError, match=r"prompt '.*tokens.*expected at most"):
        collected(changed, DRAWN, settings, tmp_path)
    assert not (tmp_path / "store").exists()
