"""A saved model that a test may damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.examples.pipelines import wan


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Path:
    """The folder of a toy pipeline, which no test changes."""
    path = tmp_path_factory.mktemp("model") / "wan"
    wan().save_pretrained(path)
    return path


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    """A copy of the toy pipeline, for one test."""
    return shutil.copytree(saved, tmp_path / "wan")
