"""What every family of problems must keep, checked for each one found; the rest stands in their own files."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import pairwise
from types import ModuleType

import numpy as np
import pytest
from scipy.stats import chi2_contingency, chisquare, poisson
from sklearn.linear_model import LogisticRegression

from cosprobe.command import load
from cosprobe.config import TrainRun
from cosprobe.errors import InputError
from cosprobe.tasks import (
    FAMILIES,
    SPLITS,
    Maze,
    MazeConfig,
    ParsedAnswer,
    Problem,
    Role,
    Target,
    Task,
    find_families,
    split_of,
)
from cosprobe.tasks.hide import HideConfig
from cosprobe.tasks.task import check_request, distinct

RARE = 1e-4  # a p below this is no chance


def problem(key: str, index: int = 0, split: str = "train") -> Problem:
    return Problem("maze", "one_exit", split, index, key, "", 0, {}, {}, (), None)


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def task(family) -> Task:
    return FAMILIES[family]().build()


@cache
def of_kind(family: str, kind: str) -> list[Problem]:
    """600 problems, and 1,500 more of the kind with one answer, of the split that half of all problems belong to: of
    others twice as many and more are drawn."""
    task = FAMILIES[family]().build()
    return task.problems("model", 600 + 1500 * (kind in task.targets[0].kinds), kind)


@cache
def problems_of(family: str) -> list[Problem]:
    """1,000 problems, kinds by turns."""
    kinds = [of_kind(family, kind) for kind in FAMILIES[family]().build().kinds]
    return [kinds[i % len(kinds)][i // len(kinds)] for i in range(1000)]


@pytest.fixture
def problems(family) -> list[Problem]:
    return problems_of(family)


def played(task: Task, problem: Problem) -> np.ndarray:
    return task.video(problem) / np.float32(255)


# how families are found


def module(name: str, **names) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(names)
    return made


def test_a_module_that_names_its_settings_is_a_family():
    found = find_families([module("a", FAMILY=MazeConfig), module("b", HideConfig=HideConfig)])
    assert found == {"maze": MazeConfig}


def test_two_families_of_one_name_are_refused():
    with pytest.raises(ValueError, match=r"\bb\b.*'maze'.*cosprobe\.tasks\.maze"):
        find_families([module("a", FAMILY=MazeConfig), module("b", FAMILY=MazeConfig)])


def test_the_families_are_those_of_the_package():
    assert list(FAMILIES) == sorted(FAMILIES)
    assert set(FAMILIES) >= {"maze", "hide", "select", "line"}


# the contract


def test_it_is_a_task_with_settings_of_its_own(family, task):
    assert isinstance(task, Task)
    assert task.name == family
    assert load(TrainRun, [f"task={family}"]).task == FAMILIES[family]()
    other = FAMILIES[family](image_size=128, frames=5, seed=3).build()
    assert other == replace(task, image_size=128, frames=5, seed=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 70}, r"task\.image_size=70.*\b16\b.*\b64\b"),
        ({"image_size": 48}, r"task\.image_size=48.*\b16\b.*\b64\b"),
        ({"frames": 1}, r"task\.frames=1\b"),
        ({"problems": 0}, r"task\.problems=0.*\b1\b"),
        ({"seeds": 0}, r"task\.seeds=0.*\b1\b"),
        ({"seed": -1}, r"task\.seed=-1.*\b0\b"),
    ],
)
def test_settings_that_cannot_be_are_refused_at_once(family, settings, message):
    with pytest.raises(ValueError, match=message):
        FAMILIES[family](**settings)


def test_targets_start_with_answer_and_choice(task):
    assert [t.name for t in task.targets[:2]] == [t.role for t in task.targets[:2]] == ["answer", "model_answer"]
    assert len({t.name for t in task.targets}) == len(task.targets)
    for target in task.targets:
        assert target.form in ("candidate", "region", "problem")
        assert target.role in ("answer", "model_answer", "perception", "memory", "nuisance", "control")
        assert set(target.kinds) <= set(task.kinds)
        if target.form == "candidate":  # the label is the index of a region
            assert target.classes == task.regions
        if target.role in ("answer", "model_answer"):
            assert target.classes == task.candidates
    assert {"perception", "nuisance", "control"} <= {t.role for t in task.targets}


def test_labels_stay_within_their_classes(task, problems):
    for target in task.targets:
        carried = [p for p in problems if target.name in p.labels]
        if target.role == "model_answer":  # the model's own answer is known only after it has drawn
            assert not carried
            continue
        assert {p.kind for p in carried} >= set(target.kinds)
        values = np.array([p.labels[target.name] for p in carried])
        assert values.shape == ((len(carried), task.regions) if target.form == "region" else (len(carried),))
        assert values.min() >= 0 and values.max() < target.classes
        assert len(np.unique(values)) > 1
    names = {target.name for target in task.targets}
    assert all(set(p.labels) <= names for p in problems)


def test_answer_solutions_and_what_is_admissible_agree(task, problems):
    for p in problems:
        right, possible = task.solutions(p), task.plausible_answers(p)
        assert 0 < len(right) < len(possible) and set(right) < set(possible) <= set(range(task.candidates))
        assert len(p.regions) == task.regions
        assert (p.task, p.kind in task.kinds) == (task.name, True)
        assert p.answer == p.labels.get("answer")
        if p.answer is not None:
            assert right == (p.answer,)


def test_prompts_are_plain_words_that_fit_the_text_encoder(problems):
    for p in problems:
        words = p.prompt.split()
        assert 0 < len(words) <= 30  # the mini model reads 32 tokens, the end of the text among them
        assert p.prompt == " ".join(words) and all(word.isalpha() and word.islower() for word in words)


@pytest.mark.slow
def test_kinds_take_turns_and_fewer_problems_are_the_first_of_more(task, problems):
    assert [p.kind for p in problems[:4]] == [task.kinds[i % len(task.kinds)] for i in range(4)]
    for kind in (None, *task.kinds):
        more = task.problems("test", 12, kind)
        assert {p.kind for p in more} == ({kind} if kind else set(task.kinds))
        for count in (1, 2, 7):
            assert task.problems("test", count, kind) == more[:count]
    with pytest.raises(ValueError, match=rf"kind='other'.*{', '.join(task.kinds)}.*None"):
        task.problems("test", 1, "other")


# identity


@pytest.mark.slow
def test_a_problem_is_in_the_split_its_key_says_and_in_no_other(task):
    keys: list[str] = []
    for split in SPLITS:
        for p in task.problems(split, 20):
            assert p.split == split == split_of(p.key)
            keys.append(p.key)
    assert len(set(keys)) == len(keys) == 20 * len(SPLITS)


@pytest.mark.slow
def test_problems_are_the_same_on_every_call_and_at_any_size(family, task, problems):
    again = task.problems("model", 60)
    assert again == problems[:60] and [p.layout for p in again] == [p.layout for p in problems[:60]]
    assert FAMILIES[family](seed=1).build().problems("model", 20) != problems[:20]
    large = FAMILIES[family](image_size=128).build().problems("model", 60)
    assert large == problems[:60] and [p.layout for p in large] == [p.layout for p in problems[:60]]
    short = FAMILIES[family](frames=5).build().problems("model", 60)
    assert [p.key for p in short] == [p.key for p in problems[:60]]


PRINT = """
import hashlib
from cosprobe.tasks import FAMILIES
for name, settings in FAMILIES.items():
    print(name, hashlib.sha256(repr(settings().build().problems("train", 60)).encode()).hexdigest())
"""


@pytest.mark.slow
def test_problems_are_the_same_in_every_process():
    """Nothing may hang on the order of a set: it differs between processes."""
    texts = [
        subprocess.run(
            [sys.executable, "-c", PRINT], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert texts[0] == texts[1]
    assert [line.split()[0] for line in texts[0].splitlines()] == list(FAMILIES)


@pytest.mark.slow
def test_there_are_twenty_thousand_problems(family, problems):
    """Two sets of n problems that are drawn independently share n^2 / N of them or more when there are N, however
    unequal their probabilities (Cauchy-Schwarz). Half of all problems belong to the split `model`."""
    problems = problems[:700]
    others = FAMILIES[family](seed=1).build().problems("model", len(problems))
    shared = len({p.key for p in problems} & {p.key for p in others})
    expected = len(problems) ** 2 / (20_000 * SPLITS["model"] / 100)
    print(f"{family}: {shared} of {len(problems)} problems are drawn twice")  # noqa: T201
    assert len({p.key for p in problems}) == len(problems)
    assert poisson.cdf(shared, expected) < RARE


# pictures


@pytest.mark.parametrize(("size", "frames"), [(64, 5), (64, 9), (64, 13), (64, 17), (128, 13)])
def test_reference_video_starts_at_the_image_moves_and_rests(family, size, frames):
    task = FAMILIES[family](image_size=size, frames=frames).build()
    for p in task.problems("test", 12):
        image, video = task.image(p), task.video(p)
        assert video.shape == (frames, size, size, 3) and video.dtype == image.dtype == np.uint8
        assert np.array_equal(video[0], image)
        assert np.array_equal(video[-1], video[-2])  # the last frames share a latent: what must be read stays
        assert sum((a != b).any() for a, b in pairwise(video)) >= 2
        mask = task.workspace(p)
        assert mask.shape == (size, size) and mask.dtype == bool
        assert not ((video != image).any((0, -1)) & ~mask).any()
        assert task.parse(p, played(task, p)).answer in task.solutions(p)


# parsing


@pytest.mark.slow
def test_parsing_of_the_reference_is_a_right_solution(task, problems):
    for p in problems[:300]:
        read = task.parse(p, played(task, p))
        assert read.answer == read.forced
        assert read.answer in task.solutions(p)
        assert read.path == 1.0
        assert len(read.scores) == task.candidates


def test_a_video_of_another_range_is_refused(task, problems):
    """Every answer would be None."""
    video = task.video(problems[0])
    for wrong, kind in ((video, "uint8"), (video.astype(np.float32), "float32")):
        with pytest.raises(InputError, match=rf"^video: type {kind} with values up to 2\d\d, expected floats"):
            task.parse(problems[0], wrong)


@pytest.mark.slow
def test_a_still_video_reads_as_none(task, problems):
    for p in problems[:80]:
        first = played(task, p)[:1]
        for video in (first, np.repeat(first, task.frames, axis=0)):
            read = task.parse(p, video)
            assert (read.answer, read.path) == (None, 0.0)
            assert np.isfinite(read.scores).all()


def test_a_grey_video_reads_as_none_and_still_has_scores(task, problems):
    for value in (0.0, 0.5, 1.0):
        read = task.parse(problems[0], np.full((task.frames, 64, 64, 3), value, dtype=np.float32))
        assert read.answer is None
        assert read.path < 1
        assert len(read.scores) == task.candidates and np.isfinite(read.scores).all()
        assert read.forced in task.plausible_answers(problems[0])


@pytest.mark.slow
def test_a_faint_video_keeps_the_order_of_the_scores(task, problems):
    for p in problems[:60]:
        video = played(task, p)
        faint = task.parse(p, 0.25 * video + 0.75 * video[:1])
        assert faint.forced == task.parse(p, video).answer


# what must not give the answer away


def dependence(regions: list, labels: list[int]) -> float:
    """p of a chi-squared test that labels are spread alike whatever the regions; 1 where these never differ."""
    places, classes = (np.unique(values, return_inverse=True, axis=0)[1].ravel() for values in (regions, labels))
    table = np.zeros((places.max() + 1, classes.max() + 1))
    np.add.at(table, (places, classes), 1)
    return float(chi2_contingency(table).pvalue)


def test_dependence_finds_regions_that_tell_the_label(rng):
    labels = rng.integers(4, size=400).tolist()
    telling = [((label / 4, 0.0, 1.0, 1.0),) for label in labels]
    silent = [((n / 4, 0.0, 1.0, 1.0),) for n in rng.integers(4, size=400)]
    assert dependence(telling, labels) < 1e-50
    assert dependence(silent, labels) > RARE
    assert dependence([telling[0]] * 400, labels) == 1


@pytest.mark.parametrize("role", ["answer", "memory", "control"])
def test_regions_never_depend_on_a_target(task, problems, role):
    for target in (t for t in task.targets if t.role == role):
        carried = [p for p in problems if target.name in p.labels]
        for column in np.array([p.labels[target.name] for p in carried]).reshape(len(carried), -1).T:
            assert dependence([p.regions for p in carried], column.tolist()) > RARE, target.name


def test_no_candidate_is_favoured(task, problems):
    """Or coordinates alone would tell it."""
    for name in ("answer", "control"):
        counts = np.bincount([p.labels[name] for p in problems if name in p.labels], minlength=task.candidates)
        assert chisquare(counts).pvalue > RARE, name


@pytest.mark.slow
def test_a_linear_classifier_of_the_first_frame_finds_little(family, task):
    """It learns from 1,500 problems with one answer and is tested on 600 unseen ones of every kind, against a guess
    among the candidates that the first frame leaves possible."""
    (answered,) = task.targets[0].kinds
    drawn = {kind: of_kind(family, kind) for kind in task.kinds}
    learn, drawn[answered] = drawn[answered][:1500], drawn[answered][1500:]

    def pixels(several: list[Problem]) -> np.ndarray:
        images = np.stack([task.image(p) for p in several]).reshape(-1, 16, 4, 16, 4, 3)
        return images.mean((2, 4), dtype=np.float32).reshape(len(several), -1) / 255

    probe = LogisticRegression(C=0.3, max_iter=500).fit(pixels(learn), [p.answer for p in learn])
    for kind, unseen in drawn.items():
        proba = np.full((len(unseen), task.candidates), -1.0)
        proba[:, probe.classes_] = probe.predict_proba(pixels(unseen))
        possible = np.array([[k in task.plausible_answers(p) for k in range(task.candidates)] for p in unseen])
        right = np.array([[k in task.solutions(p) for k in range(task.candidates)] for p in unseen])
        guess = (right.sum(1) / possible.sum(1)).mean()
        score, among = (right[np.arange(len(unseen)), pick.argmax(1)].mean() for pick in (proba, proba * possible))
        print(f"{family}/{kind}: pixels {score:.3f}, among the possible {among:.3f}, guess {guess:.3f}")  # noqa: T201
        assert max(score, among) < guess + 0.1


# what they share


def test_splits_take_their_share_of_keys():
    keys = [hashlib.sha256(str(i).encode()).hexdigest()[:16] for i in range(20_000)]
    counts = Counter(split_of(key) for key in keys)
    assert sum(SPLITS.values()) == 100
    assert set(counts) == set(SPLITS)
    for split, share in SPLITS.items():
        assert counts[split] / len(keys) == pytest.approx(share / 100, abs=0.01)


def test_distinct_keeps_the_first_of_each_key_of_its_split():
    drawn = [problem("a"), problem("b", split="test"), problem("a", 1), problem("c", 2), problem("d", 3)]
    assert [p.key for p in distinct(iter(drawn), "train", 2)] == ["a", "c"]


def test_distinct_says_when_a_difficulty_has_too_few_problems():
    with pytest.raises(ValueError, match=r"task\.problems=3.*\b1 distinct.*'train'.*difficulty"):
        distinct(iter([problem("a")] * 50), "train", 3, patience=10)


@pytest.mark.parametrize(
    ("split", "count", "kind", "message"),
    [
        ("dev", 3, None, "split='dev'.*model, train, validation, calibration, test"),
        ("train", 0, None, r"task\.problems=0.*\b1\b"),
        ("train", -2, None, r"task\.problems=-2.*\b1\b"),
        ("train", 3, "two", "kind='two'.*one_exit, choice.*None"),
    ],
)
def test_requests_that_make_no_sense(split, count, kind, message):
    with pytest.raises(ValueError, match=message):
        check_request(split, count, kind, Maze().kinds)
    with pytest.raises(ValueError, match=message):
        Maze().problems(split, count, kind)


def test_a_role_is_the_text_that_stands_in_files():
    target = Target("colour", 4, "problem", "memory", ("one",))
    assert target.role is Role.MEMORY and target.role == "memory" and json.dumps(target.role) == '"memory"'
    assert np.array([target.role]).tolist() == ["memory"]
    with pytest.raises(InputError, match=r"^role='colour': expected one of answer, model_answer, memory, perception"):
        Target("colour", 4, "problem", "colour", ("one",))


def test_forced_choice_is_the_highest_score():
    assert ParsedAnswer(None, (0.1, -0.2, 0.4, 0.0), 0.0).forced == 2


def test_a_problem_has_a_name_that_says_where_it_comes_from():
    assert problem("a", 7).name == "maze/one_exit/train/7"
