"""What an installed package holds."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_a_wheel_holds_the_commands_and_their_settings():
    """The command finds them in the folder that the wheel puts them into."""
    included = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    command = (ROOT / "cosprobe" / "command.py").read_text()
    assert 'INSTALLED = PACKAGE / "commands"' in command
    assert included == {name: f"cosprobe/commands/{name}" for name in ("configs", "train.py", "probe.py")}
    assert all((ROOT / name).exists() for name in included)
    assert PROJECT["project"]["scripts"]["cosprobe"] == "cosprobe.__main__:main"
    assert (ROOT / "cosprobe" / "py.typed").exists() and (ROOT / "cosprobe" / "__init__.pyi").exists()
