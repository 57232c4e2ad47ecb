"""What an edit of a run is: what is changed, where, and how much. Edits are data; `patch` carries them out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from cosprobe.errors import InputError
from cosprobe.files import whole_file
from cosprobe.models import COND, UNCOND

NOISES = ("fresh", "damage", "renoised")
ABLATIONS = ("zero", "mean", "resample")
HOW: dict[str, tuple[str, ...]] = {
    "noise": NOISES,
    "swap": ("",),
    "steer": ("",),
    "erase": ("",),
    "ablate": ABLATIONS,
}
SOURCED = ("swap", "steer", "erase")  # kinds that need tensors
NUMBERS = ("steps", "layers", "frames", "regions")
TEXTS = ("kind", "how", "branch", "expert", "source")


@dataclass(frozen=True)
class Edit:
    """One change of a run.

    kind: `noise` (of the latent), `swap` (states of another run), `steer` (add a direction), `erase` (remove a concept)
    or `ablate` (replace what blocks add to their input).
    how: of noise: `fresh` replaces the latent by Gaussian noise, `damage` moves it towards such noise by a change of a
    given size, `renoised` replaces it by the last x0-hat with fresh noise of the level of the step.
    Of ablations: `zero` removes what a block adds to its input, `mean` replaces it by its mean over the batch,
    `resample` by that of the sample half a batch further on.
    steps: step indices, 0 = noisiest; empty: every step. The latent of a step is what the model gets in it.
    layers: block indices; empty: the latent, for `noise` and `swap`. Outputs of blocks are edited.
    branch: guidance branch, `cond` or `uncond`; empty: both. expert: transformer, such as `high`; empty: any.
    frames: frames of the token grid; empty: all. regions: indices of the regions of each problem; empty: whole frames.
    amount: 0 changes nothing. `noise`, `swap`, `erase`, `ablate`: the share of the way from the old value to the new
    one. `steer`: factor of the direction. `noise` with `how="damage"`: the squared norm of the change of each sample,
    in each step.
    source: name of the tensors that `swap`, `steer` and `erase` use. seed: of the noise.
    Raises InputError for an unknown kind, `how` or branch, negative indices, an amount that is not finite, a negative
    amount of `damage`, values of another type, and a field that the kind does not have.
    """

    kind: str
    how: str = ""
    steps: tuple[int, ...] = ()
    layers: tuple[int, ...] = ()
    branch: str = ""
    expert: str = ""
    frames: tuple[int, ...] = ()
    regions: tuple[int, ...] = ()
    amount: float = 1.0
    source: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in NUMBERS:
            given = getattr(self, name)
            if isinstance(given, str) or not isinstance(given, Sequence):
                raise InputError(f"edit.{name}={given!r}: expected a list of indices from 0")
            if any(type(n) is not int or n < 0 for n in given):
                raise InputError(f"edit.{name}={list(given)}: expected indices from 0")
            object.__setattr__(self, name, tuple(given))
        for name in TEXTS:
            if not isinstance(given := getattr(self, name), str) or not given.isprintable():
                raise InputError(f"edit.{name}={given!r}: expected text in one line")
        if type(self.seed) is not int:
            raise InputError(f"edit.seed={self.seed!r}: expected a whole number")
        if isinstance(self.amount, bool) or not isinstance(self.amount, int | float):
            raise InputError(f"edit.amount={self.amount!r}: expected a number")
        if not abs(self.amount) <= sys.float_info.max:
            raise InputError(f"edit.amount={str(self.amount)[:40]}: expected a finite number")
        if self.kind not in HOW:
            raise InputError(f"edit.kind={self.kind!r}: expected one of {', '.join(HOW)}")
        object.__setattr__(self, "how", self.how or HOW[self.kind][0])
        if self.how not in HOW[self.kind]:
            expected = ", ".join(HOW[self.kind]) if HOW[self.kind][0] else "none"
            raise InputError(f"edit.how={self.how!r}: expected {expected} for kind {self.kind!r}")
        if self.how == "damage" and self.amount < 0:
            raise InputError(f"edit.amount={self.amount:g}: expected 0 or more, the squared norm of a change")
        if self.branch not in ("", COND, UNCOND):
            raise InputError(f"edit.branch={self.branch!r}: expected {COND}, {UNCOND}, or empty for both")
        self._check_fields()

    def _check_fields(self) -> None:
        """Raises InputError for a field that the kind does not have, and for one that it needs."""
        if self.kind == "noise" and self.layers:
            raise InputError(f"edit.layers={list(self.layers)}: noise is for the latent; expected no layers")
        if self.kind not in ("noise", "swap") and not self.layers:
            raise InputError(f"edit.layers=[]: expected at least one layer for kind {self.kind!r}")
        if self.kind in SOURCED and not self.source:
            raise InputError(f"edit.source='': expected the name of the tensors that kind {self.kind!r} uses")
        if self.kind not in SOURCED and self.source:
            raise InputError(f"edit.source={self.source!r}: kind {self.kind!r} uses no tensors; expected no source")
        if self.kind != "noise" and self.seed:
            raise InputError(f"edit.seed={self.seed}: kind {self.kind!r} draws nothing; expected no seed")
        if not self.layers and (self.branch or self.expert):
            name, value = ("branch", self.branch) if self.branch else ("expert", self.expert)
            raise InputError(f"edit.{name}={value!r}: the latent has none; expected it empty, or layers")

    def __str__(self) -> str:
        """Only what differs from the defaults, such as `swap steps=[0] layers=[20] source=donor`."""
        given = as_plain(self)
        return " ".join([given.pop("kind"), *(f"{name}={value}" for name, value in given.items())])


DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(Edit) if field.name != "kind"}


def save_edits(edits: Sequence[Edit], path: Path | str) -> None:
    """Writes edits as YAML, atomically."""
    save_listed([as_plain(edit) for edit in edits], path)


def as_plain(edit: Edit) -> dict[str, Any]:
    """The fields of an edit that differ from their defaults, as YAML has them."""
    given = {name: value for name, value in asdict(edit).items() if value != DEFAULTS.get(name)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}


def save_listed(listed: Sequence[dict[str, Any]], path: Path | str) -> None:
    """Writes a list of mappings as YAML, atomically."""
    with whole_file(Path(path)) as part:
        part.write_text(yaml.safe_dump(list(listed), sort_keys=False, default_flow_style=None))


def load_edits(path: Path | str) -> list[Edit]:
    """Reads edits from YAML: a list with one mapping per edit; fields that are left out have their defaults.

    Raises InputError for a file that is missing or no such list, and as `Edit` does.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"edits {str(path)!r}: no such file; expected a YAML list of edits")
    try:
        listed = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: text of another encoding, a month 13
        raise InputError(f"edits {str(path)!r}: no YAML ({' '.join(str(error).split())[:100]})") from error
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        raise InputError(f"edits {str(path)!r}: expected a list with one mapping per edit, such as '- kind: noise'")
    known = {*DEFAULTS, "kind"}
    for entry in listed:
        if unknown := sorted(map(str, set(entry) - known)):
            raise InputError(f"edits {str(path)!r}: unknown field {unknown[0]!r}; expected {', '.join(sorted(known))}")
        if "kind" not in entry:
            raise InputError(f"edits {str(path)!r}: an edit without kind; expected one of {', '.join(HOW)}")
    try:
        return [Edit(**entry) for entry in listed]
    except InputError as error:
        raise InputError(f"edits {str(path)!r}: {error}") from error
