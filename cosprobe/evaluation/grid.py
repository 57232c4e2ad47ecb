"""The result: a labelled array of what every cell decodes, with intervals, baselines and significance.

Everything is read on the test split; whatever had to be chosen (the best cell, the form of an input, the reference)
was chosen on train and validation.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from cosprobe.cells import INPUTS, X0, Cell
from cosprobe.errors import InputError
from cosprobe.runtime import make_folder, whole_file

CHANCE, MAJORITY, READOUT = "chance", "majority", "x0_readout"
WEIGHTS = ("permuted_weights", "fresh_weights")  # on few samples: listed, never the reference
GUESSES = (CHANCE, MAJORITY)  # what needs no input at all
VISIBLE = (READOUT, X0)  # what the picture already shows
BASELINES = (*GUESSES, *INPUTS, *VISIBLE, *WEIGHTS)
ALPHA = 0.05  # corrected p above this is no evidence
CEILING = 0.95  # above this reference there is no room left: skill is NaN
FILE = "grid.nc"


@dataclass(frozen=True)
class Best:
    """The cell with the highest validation accuracy, and what it reaches on test. p: `p_evidence`."""

    target: str
    cell: Cell
    accuracy: float
    lower: float
    upper: float
    p: float
    validation_accuracy: float


@dataclass(frozen=True, eq=False)
class Grid:
    """dataset: dimensions target, step, layer, place, and branch where there is more than one; `expert` is a
    coordinate along step. MEANING says what each variable holds."""

    dataset: xr.Dataset

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(str(name) for name in self.dataset.target.values)

    @property
    def provenance(self) -> dict[str, Any]:
        return json.loads(self.dataset.attrs["provenance"])

    def with_role(self, *roles: str) -> tuple[str, ...]:
        """Targets of these roles, in order."""
        return tuple(name for name, role in zip(self.targets, self.dataset.role.values, strict=True) if role in roles)

    def best(self, target: str) -> Best:
        """The cell with the highest validation accuracy; on a tie the earliest step, then the lowest layer.

        Raises ValueError for a target the grid does not hold.
        """
        if target not in self.targets:
            raise InputError(f"target={target!r}: expected one of {', '.join(self.targets)}")
        order = [name for name in ("step", "layer", "branch", "place") if name in self.dataset.validation_accuracy.dims]
        data = self.dataset.sel(target=target).transpose(*order, ...)
        chosen = np.nanargmax(data.validation_accuracy.values.round(12))  # first of equals: sums may differ in rounding
        at = np.unravel_index(chosen, data.validation_accuracy.shape)
        cell = data.isel(dict(zip(order, at, strict=True)))
        name = Cell(int(cell.step), str(int(cell.layer)), str(cell.branch.values), str(cell.place.values))
        values = (cell[v] for v in ("accuracy", "lower", "upper", "p_evidence", "validation_accuracy"))
        return Best(target, name, *map(float, values))

    def at(self, target: str, cell: Cell) -> xr.Dataset:
        """Everything known of one cell."""
        where = {"step": cell.step, "layer": int(cell.site), "branch": cell.branch, "place": cell.place}
        return self.dataset.sel(target=target, **{k: v for k, v in where.items() if k in self.dataset.dims})

    def plane(self, target: str, place: str | None = None, branch: str | None = None) -> xr.Dataset:
        """The layer x step plane at a place and branch; default: the plane of the best cell."""
        cell = self.best(target).cell
        where = {"place": place or cell.place, "branch": branch or cell.branch}
        return self.dataset.sel(target=target, **{k: v for k, v in where.items() if k in self.dataset.dims})

    def save(self, path: Path | str) -> Path:
        """Writes netCDF; the file is whole or absent."""
        path = Path(path)
        make_folder(path.parent)
        with whole_file(path) as part:
            self.dataset.to_netcdf(part, engine="netcdf4")
        return path

    @classmethod
    def load(cls, path: Path | str) -> Grid:
        """A saved grid, from its file, its report folder or its run folder.

        Raises ValueError when there is none or the file is damaged.
        """
        found = [p for p in (Path(path), Path(path) / FILE, Path(path) / "report" / FILE) if p.is_file()]
        if not found:
            raise InputError(f"grid {str(path)!r} is missing: expected {FILE} or a run folder; run train.py first")
        try:
            dataset = xr.load_dataset(found[0], engine="netcdf4")
            dataset["p_evidence"]
        except (OSError, ValueError, KeyError, RuntimeError):
            raise InputError(f"grid {str(found[0])!r} is damaged: expected netCDF; run train.py again") from None
        return cls(dataset)
