"""The grid: a labelled array with the accuracy, interval, baselines and significance of every cell.

Results are measured on the test split. Choices (the best cell, the form of an input, the reference) are made on train
and validation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from cosprobe.cells import Cell
from cosprobe.errors import InputError
from cosprobe.files import make_folder, whole_file
from cosprobe.runs import find_result
from cosprobe.tasks import Role

if TYPE_CHECKING:
    import pandas as pd

NESTED = "nested_accuracy"  # only with cross-fitting
FILE, CHECKSUM = "grid.nc", "sha256"  # the file, and an attribute in it


@dataclass(frozen=True)
class Best:
    """The cell with the highest validation accuracy, and its results on test. p: its `p_evidence`.

    With cross-fitting, accuracy, lower and upper are those of `nested_accuracy`: the cells that every bank chooses.
    """

    target: str
    cell: Cell
    accuracy: float
    lower: float
    upper: float
    p: float
    validation_accuracy: float


@dataclass(frozen=True, eq=False)
class Grid:
    """Results of all cells and baselines.

    dataset: its dimensions are target, step, layer, position, and branch where there is more than one. The coordinate
    `expert` (along step) names the transformer of a step. The coordinates `frame`, `row` and `column` (along position)
    are the latent frame, row and column of a position, -1 for a mean over them. `variables.MEANING` describes each
    variable.
    """

    dataset: xr.Dataset

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the targets."""
        return tuple(str(name) for name in self.dataset.target.values)

    def __repr__(self) -> str:
        plural = {"step": "steps", "layer": "layers", "position": "positions", "branch": "branches"}
        lines = [f"Grid({', '.join(f'{many}: {self.dataset.sizes.get(one, 1)}' for one, many in plural.items())})"]
        for row in self._summary():
            lines.append("  " + "  ".join(row))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """The table of the best cells, for notebooks."""
        head, *rows = self._summary()
        cells = ["".join(f"<th>{escape(name)}</th>" for name in head)]
        cells += ["".join(f"<td>{escape(value)}</td>" for value in row) for row in rows]
        return "<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"

    def _summary(self) -> list[tuple[str, ...]]:
        rows = [("target", "best cell", "accuracy [95 %]", "p_evidence")]
        varied = [name for name in ("branch", "position") if self.dataset.sizes.get(name, 1) > 1]
        controls = self.with_role(Role.RELABELLED)
        for best in (self.best(name) for name in self.targets if name not in controls):
            interval = f"{best.accuracy:.2f} [{best.lower:.2f}, {best.upper:.2f}]"
            where = [f"step {best.cell.step}", f"layer {best.cell.layer}"]
            where += [str(getattr(best.cell, name)) for name in varied]
            rows.append((best.target, ", ".join(where), interval, f"{best.p:.3f}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return [tuple(v.ljust(w) for v, w in zip(row, widths, strict=True)) for row in rows]

    def to_dataframe(self) -> pd.DataFrame:
        """A pandas table with a row for each target and cell, and a column for each variable of a cell.

        Columns such as `baseline x_t` have the accuracy of a baseline at the step of the cell.
        """
        axes = [name for name in ("target", "step", "layer", "branch", "position") if name in self.dataset.dims]
        own = [name for name, values in self.dataset.data_vars.items() if set(values.dims) == set(axes)]
        table = self.dataset[own]
        for name in self.dataset.baseline.values:
            accuracy = self.dataset.baseline_accuracy.sel(baseline=name, drop=True)
            table[f"baseline {name}"] = accuracy.broadcast_like(self.dataset.accuracy)
        return table.to_dataframe(dim_order=axes).reset_index()

    @property
    def provenance(self) -> dict[str, Any]:
        """Model, data and settings that the bank was trained with; `bank` is its fingerprint."""
        return json.loads(self.dataset.attrs["provenance"])

    @property
    def folds(self) -> int:
        """Number of folds of cross-fitting, 0 for a grid of one split."""
        return int(self.provenance.get("probe", {}).get("folds", 0))

    def with_role(self, *roles: Role | str) -> tuple[str, ...]:
        """Targets of these roles, in order."""
        return tuple(name for name, role in zip(self.targets, self.dataset.role.values, strict=True) if role in roles)

    def best(self, target: str) -> Best:
        """The cell with the highest validation accuracy; on a tie the earliest step, then the lowest layer.

        Raises InputError for a target that the grid does not hold.
        """
        if target not in self.targets:
            raise InputError(f"target={target!r}: expected one of {', '.join(self.targets)}")
        order = [
            name for name in ("step", "layer", "branch", "position") if name in self.dataset.validation_accuracy.dims
        ]
        shown = self.dataset[["accuracy", "lower", "upper", "p_evidence", "validation_accuracy"]].sel(target=target)
        validation = shown.validation_accuracy.transpose(*order)
        chosen = np.nanargmax(validation.values.round(12))  # rounded, so that ties are ties
        at = np.unravel_index(chosen, validation.shape)
        cell = shown.isel(dict(zip(order, at, strict=True)))
        name = Cell(int(cell.step), int(cell.layer), str(cell.branch.values), str(cell.position.values))
        values = {str(variable): float(value) for variable, value in cell.data_vars.items()}
        if NESTED in self.dataset:
            nested = self.dataset.sel(target=target)
            values |= {"accuracy": float(nested[NESTED])}
            values |= {end: float(nested[f"{NESTED}_{end}"]) for end in ("lower", "upper")}
        return Best(target, name, *values.values())

    def at(self, target: str, cell: Cell) -> xr.Dataset:
        """All variables at one cell."""
        where = {"step": cell.step, "layer": cell.layer, "branch": cell.branch, "position": cell.position}
        return self.dataset.sel(target=target, **{k: v for k, v in where.items() if k in self.dataset.dims})

    def plane(self, target: str, position: str | None = None, branch: str | None = None) -> xr.Dataset:
        """All variables by layer and step at one position and branch; by default those of the best cell."""
        cell = self.best(target).cell
        where = {"position": position or cell.position, "branch": branch or cell.branch}
        return self.dataset.sel(target=target, **{k: v for k, v in where.items() if k in self.dataset.dims})

    def save(self, path: Path | str) -> Path:
        """Writes a netCDF file. An interrupted call leaves no partial file."""
        path = Path(path)
        make_folder(path.parent)
        with whole_file(path) as part:
            self.dataset.assign_attrs({CHECKSUM: _checksum(self.dataset)}).to_netcdf(part, engine="netcdf4")
        return path

    @classmethod
    def load(cls, path: Path | str) -> Grid:
        """Loads a grid from its file, its report folder, the folder of its result, or a run folder with one result.

        Raises InputError for a run folder with several results, when there is no such file, and when it is damaged or
        was written by another version.
        """
        folder = find_result(path)
        found = [p for p in (folder, folder / FILE, folder / "report" / FILE) if p.is_file()]
        if not found:
            raise InputError(f"grid {str(path)!r} is missing: expected {FILE} or a run folder; run train.py first")
        try:
            dataset = xr.load_dataset(found[0], engine="netcdf4")
        except Exception as error:  # netCDF, HDF5 and xarray raise errors of many classes for damaged files
            raise InputError(f"grid {str(found[0])!r} is damaged: expected netCDF; run train.py again") from error
        if missing := [name for name in ("position", "p_evidence", "x0_accuracy") if name not in dataset.variables]:
            raise InputError(
                f"grid {str(found[0])!r} has no {missing[0]}: expected a grid of this version; run train.py again"
            )
        if dataset.attrs.pop(CHECKSUM, None) != _checksum(dataset):
            raise InputError(
                f"grid {str(found[0])!r} is damaged or was edited (its checksum differs); run train.py again"
            )
        return cls(dataset)


def _checksum(dataset: xr.Dataset) -> str:
    """SHA-256 of all variables, their names along the axes and their attributes, as they are after reading a file."""
    digest = hashlib.sha256()
    for name in sorted(map(str, dataset.variables)):
        variable = dataset.variables[name]
        values = variable.values
        digest.update(f"{name} {variable.dims} {values.shape} {_plain(variable.attrs)}".encode())
        if values.dtype.kind in "biuf":
            numbers = np.ascontiguousarray(values, dtype=float)
            digest.update(np.where(np.isnan(numbers), np.nan, numbers).tobytes())
        else:
            digest.update(json.dumps(list(map(str, values.ravel()))).encode())
    digest.update(_plain(dataset.attrs).encode())
    return digest.hexdigest()


def _plain(attributes: Mapping[Any, Any]) -> str:
    return json.dumps({str(name): np.asarray(value).tolist() for name, value in sorted(attributes.items())})
