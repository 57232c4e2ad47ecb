"""Shared by all tests: one thread, fixed randomness, no process group left behind."""

from __future__ import annotations

import gc
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

# read when torch and the libraries of linear algebra are loaded, also in every process that a test starts: threads of
# several processes that wait for each other on the same cores cost several times what a test itself does
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MATPLOTLIBRC"] = str(Path(__file__).resolve().parent / "matplotlibrc")  # read when matplotlib is loaded

import jaxtyping
import numpy as np
import pytest
from hypothesis import settings
from threadpoolctl import threadpool_limits

settings.register_profile("dev", max_examples=20, deadline=None, derandomize=True)
settings.register_profile("ci", max_examples=200, deadline=None, derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))
threadpool_limits(1)  # of what plugins of pytest have loaded before

SHAPE = re.compile(r"\b(Bool|Float|Int|Num|Shaped|UInt)\d*\[")


def where_shapes_are(jaxtyped: Callable[..., Any]) -> Callable[..., Any]:
    """The decorator that checks shapes, for functions and dataclasses whose annotations name one. All others are left
    to mypy: solvers call some of them so often that a fit would take twice as long."""

    def decorate(checked: Any = None, **given: Any) -> Any:
        if checked is None:
            return lambda checked: decorate(checked, **given)
        holders = checked.__mro__ if isinstance(checked, type) else (checked,)
        return jaxtyped(checked, **given) if any(map(_names_a_shape, holders)) else checked

    return decorate


def _names_a_shape(holder: Any) -> bool:
    """Whether an annotation of a function or class does, by itself or by a name that its module gives to a shape."""
    texts = [str(text) for text in getattr(holder, "__annotations__", {}).values()]
    words = {word for text in texts for word in re.findall(r"\w+", text)}
    return any(map(SHAPE.search, texts)) or any(_is_a_shape(holder.__module__, word) for word in words)


@cache
def _is_a_shape(module: str, name: str) -> bool:
    known = vars(sys.modules[module])
    return name in known and SHAPE.search(str(known[name])) is not None


jaxtyping.jaxtyped = where_shapes_are(jaxtyping.jaxtyped)  # before a module of the package is imported


# the files that take longest, in this order
LONGEST = (
    *("end_to_end", "cli", "launchers", "checkpoints", "task", "baselines", "readme", "logistic", "api", "run_page"),
    *("benchmarks", "report", "newton", "validity", "config", "select", "processes", "shipped", "oracles", "reports"),
    *("planted", "collection", "line", "quickstart", "recipe", "predicting", "patching", "interventions", "conformity"),
    *("lengths", "plan", "hide", "untrained", "comparison", "continuations", "films", "maze", "run", "suite"),
    *("threshold", "disk", "loading", "defaults", "summary", "masks", "figures", "references", "torture"),
)


# files whose tests are slow together: several seconds, on models at toy size
SLOW = (
    *("patching", "interventions", "prefix", "hub", "reports", "loading", "defaults", "fit_to", "untrained"),
    *("collection", "run_page", "report", "interventions", "lengths", "continuations", "tensorboard", "checks"),
    *("check_figures", "summary", "token_labels", "patching", "conformity", "validity", "page", "films"),
)


@pytest.hookimpl(tryfirst=True)  # before tests are selected by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first, so that several processes end at about the same time."""
    place = {f"test_{name}.py": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))
    for item in items:
        if item.path.stem.removeprefix("test_") in SLOW:
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Leaves what the libraries made while they were imported out of every later garbage collection, and collects less
    often: a twentieth of the time of tests."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """Every test starts from the same torch seed, and leaves no process group and no logging to the next.

    Hydra logs everything after `--info`. Each image and font that a later test opens would then be logged, to a stream
    that is closed: a fifth of the time of some test files.
    """
    import torch  # here, so that the process that only hands out tests starts without it

    torch.default_generator.manual_seed(0)  # torch.manual_seed keeps the stack of every call for a GPU that may come
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    for handler in set(root.handlers) - set(handlers):
        root.removeHandler(handler)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish() -> None:
    """Leaves what is there out of the ten garbage collections with which pytest ends."""
    gc.freeze()
