"""Imports between rooms go one way, through what a room offers; libraries stay in their rooms."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module

import pytest

import cosprobe
from tests.architecture import ENTRIES, FILES, ROOMS, ROOT, arrows, drawing, imports, inside, module_of, room_of

ONLY_IN = {  # library: the rooms that may import it
    "hydra": {"command"},
    "omegaconf": {"command"},
    "yaml": {"command", "causal", "webpage"},
    "jinja2": {"webpage"},
    "plotly": {"webpage"},
    "matplotlib": {"reporting", "early_exit", "ensembles", "causal", "behaviour", "tokens", "comparison"},
    "concept_erasure": {"causal"},
    "lightning": {"runtime", "monitoring", "activations", "probes", "minimodel", "train", "probe"},
    "peft": {"models", "minimodel"},
    "torchmetrics": {"probes"},
    "diffusers": {"models", "minimodel"},
    "transformers": {"models", "minimodel"},
    "tokenizers": {"minimodel"},
    "sklearn": set(),
    "pandas": {"evaluation", "tasks"},
}
VAGUE = {"utils", "util", "helpers", "helper", "manager", "managers", "misc", "common", "components", "base", "core"}


def test_every_module_stands_in_a_room():
    for path in FILES:
        assert room_of(module_of(path)), f"{path}: no room has it"


def test_imports_between_rooms_go_one_way():
    order = (*ROOMS, *ENTRIES)
    for room, others in arrows().items():
        wrong = {other for other in others if other in ENTRIES or order.index(other) > order.index(room)}
        assert not wrong, f"{room} imports {', '.join(sorted(wrong))}"


def test_a_room_is_entered_through_what_it_offers():
    for path in FILES:
        own = room_of(module_of(path))
        for module, name in inside(path):
            room = room_of(module)
            if room != own:
                assert module == room, f"{module_of(path)} imports cosprobe.{module}, expected cosprobe.{room}"
                assert name in offered(room), f"cosprobe.{room} does not offer {name}"


def offered(room: str) -> set[str]:
    module = import_module(f"cosprobe.{room}")
    return {*module.__dict__, *getattr(module, "__all__", ())}


@pytest.mark.parametrize("room", [room for room in ROOMS if (ROOT / "cosprobe" / room.replace(".", "/")).is_dir()])
def test_a_room_says_what_happens_in_it_and_what_it_offers(room):
    module = import_module(f"cosprobe.{room}")
    assert module.__doc__
    assert all(hasattr(module, name) for name in module.__all__)
    assert len(set(module.__all__)) == len(module.__all__)


@pytest.mark.slow
def test_the_chart_in_the_docs_is_the_one_of_the_code():
    assert f"```mermaid\n{drawing()}\n```" in (ROOT / "docs" / "architecture.md").read_text()


@pytest.mark.slow
def test_libraries_stay_in_their_rooms():
    for path in FILES:
        for module, _ in imports(path):
            allowed = ONLY_IN.get(module.split(".")[0])
            room = room_of(module_of(path))
            assert allowed is None or room in allowed, f"{module_of(path)} imports {module}"


def test_only_the_commands_need_the_command_line():
    assert {room for room, others in arrows().items() if "command" in others} == {"__main__", "train", "probe"}


@pytest.mark.slow
def test_importing_is_fast_and_changes_nothing():
    """The package loads its names on first access, and the settings load neither torch nor diffusers."""
    assert all(getattr(cosprobe, name).__name__ == name for name in cosprobe.__all__)
    code = (
        "import os, sys, warnings, logging\n"
        "before = dict(os.environ), list(warnings.filters), list(logging.root.handlers)\n"
        "import cosprobe\n"
        "assert before == (dict(os.environ), list(warnings.filters), list(logging.root.handlers))\n"
        "import cosprobe.command\n"
        "heavy = {'torch', 'lightning', 'diffusers', 'transformers', 'xarray', 'matplotlib'}\n"
        "print(sorted(heavy & set(sys.modules)), set(cosprobe.__all__) <= set(dir(cosprobe)))\n"
    )
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert said.stdout == "[] True\n"


def test_modules_are_named_by_what_they_hold():
    for path in FILES:
        assert path.stem not in VAGUE, path


def test_modules_say_what_they_are_for():
    for path in FILES:
        text = path.read_text()
        assert ast.get_docstring(ast.parse(text)), f"{path} has no docstring"
        assert path.name == "__init__.py" or ("__future__", "annotations") in imports(path), path
        for place in ("/work" + "/", "/root" + "/", "/tmp" + "/"):
            assert place not in text, f"{path} names a folder of one machine"
