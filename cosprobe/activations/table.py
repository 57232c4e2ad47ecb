"""Tables of samples: which samples a run reads from a store, and their labels.

Labels follow from the problems alone, so they are kept apart from the activations. Other targets on activations that
are there need another table and no sampling.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosprobe.cells import SPLIT_ORDER
from cosprobe.checked import read_tensors, write_tensors
from cosprobe.errors import InputError
from cosprobe.tasks import Sample, Target, Task

FILES = "samples-*.safetensors"


@dataclass(frozen=True, eq=False)
class SampleTable:
    """Names and labels of the samples of a run, in order.

    request: what the samples were drawn by (number of problems and of noise seeds). targets, kinds: of the task.
    columns: `label.<target>` [sample] or [sample, region], -1 where a sample has none, for every target but
    model_answer; `difficulty.<name>`, `key`, `split`, `kind` and `replica` [sample], the last four as numbers.
    """

    request: dict[str, Any]
    names: tuple[str, ...]
    targets: tuple[Target, ...]
    kinds: tuple[str, ...]
    columns: dict[str, Tensor]

    @classmethod
    def of(cls, task: Task, samples: Sequence[Sample], request: Mapping[str, Any]) -> SampleTable:
        """The table of samples that were drawn from a task."""
        problems = [sample.problem for sample in samples]
        columns = {}
        for target in task.targets:
            if target.role != "model_answer":
                missing = (-1,) * task.regions if target.form == "region" else -1
                rows = [p.labels.get(target.name, missing) if p.kind in target.kinds else missing for p in problems]
                columns[f"label.{target.name}"] = torch.tensor(rows)
        for name in problems[0].difficulty:
            columns[f"difficulty.{name}"] = torch.tensor([p.difficulty[name] for p in problems])
        columns["key"] = torch.tensor([int(p.key[:15], 16) for p in problems])
        columns["split"] = torch.tensor([SPLIT_ORDER.index(p.split) for p in problems])
        columns["kind"] = torch.tensor([task.kinds.index(p.kind) for p in problems])
        columns["replica"] = torch.tensor([sample.replica for sample in samples])
        return cls(
            dict(request),
            tuple(s.name for s in samples),
            tuple(task.targets),
            tuple(task.kinds),
            dict(sorted(columns.items())),
        )

    @staticmethod
    def path(folder: Path, request: Mapping[str, Any], targets: Sequence[Target], kinds: Sequence[str]) -> Path:
        """The file of a table in the folder of a store."""
        content = {"request": dict(request), "targets": [asdict(target) for target in targets], "kinds": list(kinds)}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
        return folder / FILES.replace("*", digest)

    def save(self, folder: Path) -> Path:
        """Writes the table to the folder of a store, atomically, and returns the file."""
        path = self.path(folder, self.request, self.targets, self.kinds)
        targets = [asdict(target) for target in self.targets]
        about = {"request": self.request, "names": self.names, "targets": targets, "kinds": self.kinds}
        write_tensors(path, self.columns, about)
        return path

    @classmethod
    def load(cls, path: Path) -> SampleTable:
        """Reads a table. Raises InputError when it is missing or damaged."""
        columns, about = read_tensors(path)
        targets = tuple(Target(**entry | {"kinds": tuple(entry["kinds"])}) for entry in about["targets"])
        return cls(about["request"], tuple(about["names"]), targets, tuple(about["kinds"]), columns)

    @classmethod
    def largest(cls, folder: Path) -> SampleTable:
        """The table in the folder of a store that has most samples.

        Raises InputError when there is none, and when it lacks samples of another table.
        """
        tables = [cls.load(path) for path in sorted(folder.glob(FILES))]
        if not tables:
            raise InputError(f"store {str(folder)!r} has no table of samples ({FILES}): run train.py again to write it")
        largest = max(tables, key=lambda table: len(table.names))
        for table in tables:
            if not set(table.names) <= set(largest.names):
                raise InputError(
                    f"store {str(folder)!r} holds several sets of samples, and none has all of them: expected a run "
                    "folder or a result, which says which set is meant; or collect the images again, which samples none"
                )
        return largest
