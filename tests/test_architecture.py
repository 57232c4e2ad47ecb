"""The map of the package: imports only point down, and what belongs to one module stays there."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = {  # a module may import any module that stands before it
    0: ["types"],
    1: [
        *("tasks", "pooling", "solvers", "ridge", "newton"),
        *("metrics", "latency", "timing", "calibration", "grid", "predictions", "scoring", "store", "policy"),
    ],
    2: ["arrangement", "pipelines", "cost", "capture", "interventions", "randomised", "halting", "reading", "probes"],
    3: [
        *("devices", "data", "refitting", "transfer", "efficiency", "nuisance", "training"),
        *("collect", "inputs", "samples", "baselines", "evaluation"),
        *("solving", "autoencoding", "flowmatching", "encoding", "mini", "adapting"),
    ],
    4: [
        *("methods", "judging", "ensemble", "trials", "seeds"),
        *("stopping", "frontier", "early", "card", "checks"),
    ],
    5: [
        *("figures", "film", "gallery", "diagnostics", "summary", "report", "beside"),
        *("savings", "seedreport"),
    ],
    6: ["config"],
    7: ["train", "probe"],
}
ORDER = [module for layer in LAYERS.values() for module in layer]
ONLY_IN = {  # library: the modules that may import it
    "hydra": {"config"},
    "omegaconf": {"config"},
    "yaml": {"config"},
    "matplotlib": {"figures", "film", "gallery", "diagnostics", "report", "savings", "seedreport"},
    "lightning": {*LAYERS[3], *LAYERS[4], "report"},
    "peft": {"adapting"},
    "torchmetrics": {"training"},
    "diffusers": {"arrangement", "pipelines", "autoencoding", "encoding", "mini"},
    "transformers": {"pipelines", "encoding", "mini"},
    "tokenizers": {"encoding"},
    "xarray": {"grid", "scoring", *LAYERS[4], *LAYERS[5]},
    "sklearn": set(),
    "pandas": set(),
}
VAGUE = {"utils", "util", "helpers", "helper", "manager", "managers", "misc", "common", "components", "base", "core"}
ENTRIES = [ROOT / "train.py", ROOT / "probe.py"]
FILES = sorted((ROOT / "cosprobe").rglob("*.py")) + ENTRIES


def module_of(path: Path) -> str:
    """`grid` for cosprobe/grid.py, `tasks` for everything in cosprobe/tasks, `` for the package itself."""
    inside = path.relative_to(ROOT).with_suffix("").parts
    return "" if inside == ("cosprobe", "__init__") else inside[min(1, len(inside) - 1)]


def imports(path: Path) -> set[str]:
    """Dotted names of everything a file imports, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.fixture(params=FILES, ids=lambda path: str(path.relative_to(ROOT)))
def path(request) -> Path:
    return request.param


def test_every_module_has_a_layer(path):
    assert module_of(path) in {*ORDER, ""}


def test_imports_point_down(path):
    module = module_of(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "cosprobe" and not module:  # the package's own names serve scripts without settings or figures
            assert parts[1] not in (*LAYERS[5], *LAYERS[6], *LAYERS[7]), f"the package imports {name}"
        elif parts[0] == "cosprobe":
            assert len(parts) > 2, f"{module} imports {name} from the package itself, name the module"
            other = parts[1]
            below = ORDER.index(other) < ORDER.index(module)
            assert below or other == module == "tasks", f"{module} imports {other}"


def test_libraries_stay_in_their_modules(path):
    for name in imports(path):
        library = name.split(".")[0]
        allowed = ONLY_IN.get(library)
        assert allowed is None or module_of(path) in allowed, f"{module_of(path)} imports {library}"


def test_the_package_works_without_hydra():
    """`from cosprobe import ...` is for notebooks: it must not reach the settings."""
    assert not any(name.startswith("cosprobe.config") for name in imports(ROOT / "cosprobe" / "__init__.py"))


def test_modules_are_named_by_what_they_hold(path):
    assert path.stem not in VAGUE


def test_modules_say_what_they_are_for(path):
    text = path.read_text()
    if text.strip():
        tree = ast.parse(text)
        assert ast.get_docstring(tree), f"{path} has no docstring"
        if path.name != "__init__.py":
            assert "__future__.annotations" in imports(path)
    for place in ("/work" + "/", "/root" + "/", "/tmp" + "/"):
        assert place not in text, f"{path} names a folder of one machine"
