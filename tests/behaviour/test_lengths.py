"""Other numbers of frames and steps: planted answers give planted claims, and runs are those of the pipeline itself."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from cosprobe.behaviour.lengths import (
    Lengths,
    LengthSampling,
    Setting,
    claims,
    matched,
    sample_lengths,
    settings_of,
    trained_lengths,
)
from cosprobe.behaviour.lengths_report import about, compare_lengths, figure, numbers, page, write_lengths
from cosprobe.config import LengthsConfig, PipelineConfig
from cosprobe.errors import InputError
from cosprobe.evaluation import FAILS, HOLDS, UNCLEAR, UNTESTED, difference_interval
from cosprobe.tasks import Maze, Problem, fresh_problems, with_noise
from tests.examples.causal import finished

COUNT, SEED = 60, 3
OWN = Setting(13, 20)
SETTINGS = [
    OWN,
    replace(OWN, again=True),
    *(Setting(f, 20) for f in (5, 9, 17)),
    *(Setting(13, s) for s in (5, 10, 50)),
]


@cache
def problems() -> list[Problem]:
    return Maze().problems("test", COUNT, "one_exit")


def planted(right: dict[Setting, float], count: int = COUNT, clips=None) -> Lengths:
    """The first problems of each setting are answered right, the others show no answer. Own: 0.9, others as own."""
    answers, correct = {}, {}
    for setting in SETTINGS:
        correct[setting] = np.arange(count) < round(right.get(setting, 0.9) * count)
        answers[setting] = np.where(correct[setting], [p.answer for p in problems()[:count]], -1)
    gflop = {s: (s.frames // 4 + 1) * s.steps / 10 for s in SETTINGS}
    return Lengths("maze", "one_exit", OWN, tuple(problems()[:count]), answers, correct, gflop, clips)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("run"))


# planted


def verdicts(found):
    return [claim.verdict for claim in claims(found)]


def test_equal_settings_give_no_evidence():
    assert verdicts(planted({})) == [UNCLEAR] * 5


@pytest.mark.parametrize(
    ("setting", "share", "at", "verdict"),
    [
        (Setting(5, 20), 0.5, 0, HOLDS),
        (Setting(5, 20), 1.0, 0, UNCLEAR),  # 6 of 60
        (Setting(17, 20), 0.5, 1, FAILS),
        (Setting(13, 5), 0.5, 2, HOLDS),
        (Setting(13, 50), 0.5, 3, FAILS),
        (Setting(13, 10), 0.5, 4, HOLDS),
        (Setting(5, 20), 0.5, 4, FAILS),
    ],
)
def test_a_planted_drop_is_found_where_it_is(setting, share, at, verdict):
    claim = claims(planted({setting: share}))[at]
    assert claim.verdict == verdict
    if verdict != UNCLEAR:
        assert str(setting) in claim.measure and abs(claim.value) == pytest.approx(0.4)
        assert claim.lower < claim.value < claim.upper and (claim.value > 0) == (verdict == HOLDS)


def test_no_settings_of_a_sort_is_said():
    found = planted({})
    found = replace(found, answers={OWN: found.answers[OWN]}, right={OWN: found.right[OWN]})
    assert verdicts(found) == [UNTESTED] * 5
    assert "no fewer frames than the 13 of the run" in claims(found)[0].measure
    assert verdicts(planted({Setting(5, 20): 0.0}, count=11))[0] == UNTESTED  # too few problems


def test_frames_are_compared_with_steps_of_about_the_same_cost():
    """5 of 13 frames are 2 of 4 latent frames, as 10 of 20 steps; 9 are 3 of 4, and 10 steps are nearest."""
    found = planted({})
    assert matched(found) == [(Setting(5, 20), Setting(13, 10)), (Setting(9, 20), Setting(13, 10))]
    dear = replace(found, gflop=found.gflop | {Setting(13, 10): 1.0, Setting(13, 5): 0.5})
    assert matched(dear) == [] and claims(dear)[4].verdict == UNTESTED and "1.5" in claims(dear)[4].measure


def test_rows_are_paired_with_the_own_setting():
    found = planted({Setting(13, 5): 0.7})
    saved = {row["setting"]: row for row in numbers(found)["settings"]}
    row = saved["13 frames, 5 steps"]
    wins = np.where((np.arange(COUNT) >= 42) & (np.arange(COUNT) < 54), -1.0, 0.0)
    ends = [float(end[0]) for end in difference_interval(wins[None], found.keys)]
    assert row["minus_own"] == pytest.approx([-0.2, *ends]) and row["right"][0] == pytest.approx(0.7)
    assert row["same"][0] == pytest.approx(0.8) and row["no_answer"] == pytest.approx(0.3)
    assert row["cost"] == pytest.approx(0.25) and row["evaluations"] == 5
    assert saved[str(OWN)]["minus_own"][0] == 0 and saved[str(OWN)]["same"][0] == 1


def test_what_the_model_was_trained_on_is_said():
    unknown, known = planted({}), planted({}, clips={5: 7, 13: 9})
    assert "not known" in " ".join(about(unknown)) and "out of distribution" in " ".join(about(unknown))
    said = " ".join(about(known))
    assert "7 of 5 frames, 9 of 13 frames" in said and "not trained on 9, 17 frames" in said
    assert trained_lengths(PipelineConfig())[13] > 1000  # the model in the package
    assert trained_lengths(PipelineConfig(lora="x")) is None


@pytest.mark.parametrize("content", [None, "[]", "{", '{"settings": {"lengths": [1], "clips": []}}'])
def test_another_file_of_the_same_name_is_no_recipe(tmp_path, content):
    if content is not None:
        (tmp_path / "recipe.json").write_text(content)
    assert trained_lengths(PipelineConfig(path=str(tmp_path))) is None


def test_page_numbers_and_figure_are_written(tmp_path):
    found = planted({Setting(13, 5): 0.5, Setting(17, 20): 0.7}, clips={5: 7, 13: 9})
    written = write_lengths(found, tmp_path / "report", tmp_path / "tensorboard")
    text = written.read_text()
    assert text == "\n".join(page(found)) + "\n" and "another noise seed" in text
    saved = json.loads((written.parent / "lengths.json").read_text())
    assert len(saved["claims"]) == 5 and saved["n"] == COUNT and not saved["trial"]
    assert (written.parent / "lengths.png").stat().st_size > 1000
    assert any((tmp_path / "tensorboard" / "lengths").iterdir())
    ticks = [[label.get_text() for label in axes.get_xticklabels()] for axes in figure(found).axes]
    assert ticks[0][0].split("\n") == ["5", "cost 0.50", "7 clips"] and ticks[1][0].split("\n") == ["5", "cost 0.25"]


# settings


def test_the_own_setting_comes_first_and_nothing_twice():
    use = LengthsConfig(frames=[5, 13, 5], steps=[20, 50])
    config = PipelineConfig(frames=13, steps=20)
    assert settings_of(config, use) == [OWN, replace(OWN, again=True), Setting(5, 20), Setting(13, 50)]


def test_bad_settings_are_refused(run):
    for values in ({"frames": [0]}, {"steps": [5, 20_000]}, {"problems": 1}):
        with pytest.raises(InputError, match=f"use.{next(iter(values))}"):
            LengthsConfig(**values)
    for use, said in (
        (LengthsConfig(frames=[5, 8]), r"use.frames=\[5, 8\].*4k \+ 1.*5 or 9"),
        (LengthsConfig(frames=[1]), r"use.frames=\[1\].*task.frames=1"),
        (LengthsConfig(kind="no"), "use.kind='no'"),
    ):
        with pytest.raises(InputError, match=said):
            sample_lengths(run.sampler, run.task, run.bank, use, SEED, run.folder)


def test_reports_of_other_sizes_have_other_folders():
    assert LengthsConfig().report == "lengths" and LengthsConfig(frames=[5]).report == "lengths"
    assert LengthsConfig(kind="choice", problems=8).report == "lengths-choice-8problems"


# sampled


def test_answers_are_those_of_the_pipeline_at_that_length(run, tmp_path, capsys):
    use = LengthsConfig(frames=[9], steps=[2], problems=8, kind="choice")
    found = sample_lengths(run.sampler, run.task, run.bank, use, SEED, tmp_path)
    assert "4 settings of 8 problems" in capsys.readouterr().out
    fresh = fresh_problems(run.sampler.task, "test", run.task.problems, 8, ["choice"])
    assert [p.name for p in found.problems] == [p.name for p in fresh]
    samples = with_noise(fresh, SEED, 2)
    size = run.sampler.config.batch
    for setting in found.settings:
        config = replace(run.sampler.config, frames=setting.frames, steps=setting.steps)
        alone = replace(run.sampler, config=config)
        own = samples[int(setting.again) :: 2]
        for start in range(0, 8, size):
            batch = own[start : start + size]
            video = alone(batch)
            assert video.shape[1] == setting.frames
            expected = alone.parse([s.problem for s in batch], video).answers
            assert found.answers[setting][start : start + size].tolist() == expected.tolist()
        for problem, answer, right in zip(fresh, found.answers[setting], found.right[setting], strict=True):
            assert right == (answer in run.sampler.task.solutions(problem))
    assert len({tuple(answers) for answers in found.answers.values()}) == 4  # each setting has videos of its own
    assert found.cost(Setting(5, 2)) < 1 < found.cost(Setting(9, 3)) and math.isclose(found.cost(found.own), 1)


def test_nothing_is_sampled_twice_and_more_problems_add_to_the_first(run, tmp_path, monkeypatch):
    made = []
    original = LengthSampling.predict_step

    def counted(self, batch, index):
        made.append((batch.content.setting, len(batch)))
        if len(made) == 3:
            raise KeyboardInterrupt
        return original(self, batch, index)

    monkeypatch.setattr(LengthSampling, "predict_step", counted)
    use = LengthsConfig(frames=[9], steps=[], problems=6)
    with pytest.raises(KeyboardInterrupt):
        sample_lengths(run.sampler, run.task, run.bank, use, SEED, tmp_path)
    first = sample_lengths(run.sampler, run.task, run.bank, use, SEED, tmp_path)
    assert [setting for setting, _ in made[:3]] == first.settings and made[3:] == [(Setting(9, 3), 6)]
    more = sample_lengths(run.sampler, run.task, run.bank, replace(use, problems=9), SEED, tmp_path)
    assert [count for _, count in made[4:]] == [3, 3, 3]
    for setting, answers in first.answers.items():
        assert more.answers[setting][:6].tolist() == answers.tolist()


def test_the_use_writes_its_report(run, capsys):
    compare_lengths(run.sampler, run.task, run.bank, LengthsConfig(frames=[9], steps=[2], problems=2), SEED, run.folder)
    said = capsys.readouterr().out
    page = run.folder / "report" / "lengths-2problems" / "lengths.md"
    assert str(page) in said and "cannot be tested here" in said and page.is_file()
    assert json.loads((page.parent / "lengths.json").read_text())["trial"]
