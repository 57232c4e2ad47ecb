"""`task=table`: one row of a CSV, Parquet or JSON file per problem, as VideoThinkBench and DiffSynth write them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from cosprobe.errors import InputError
from cosprobe.tasks.disk import DiskTask, Entry
from cosprobe.tasks.entries import DiskConfig, build_task
from cosprobe.tasks.folder import flat
from cosprobe.tasks.pictures import Broken

IMAGES = ("image", "first_frame", "input_image", "image_path", "first_image_path")  # columns, the first that is there
PROMPTS = ("prompt", "question", "text", "caption")
IDS = ("id", "task_id", "name")


@dataclass
class TableConfig(DiskConfig):
    """Problems in the rows of a table. Raises InputError for a value out of range."""

    family: ClassVar[str] = "table"
    file: str = ""
    "CSV, Parquet or JSON file; each row or object is a problem. Paths of images are relative to its folder."
    image_column: str = ""
    "Column with the path of the image; empty: `image` or a similar name. Without such a column there is no image."
    prompt_column: str = ""
    "Column with the prompt; empty: `prompt`, `question`, `text` or `caption`."

    def build(self) -> DiskTask:
        """Reads the table. Raises InputError for a file that cannot be read, and as `build_task` does."""
        if not self.file:
            raise InputError("task.file='': expected task.file=FILE.csv, .parquet or .json")
        path = Path(os.path.expanduser(self.file))
        rows = read_rows(path)
        columns = list(dict.fromkeys(name for row in rows for name in row))
        image = _column("image_column", self.image_column, IMAGES, columns)
        prompt = _column("prompt_column", self.prompt_column, PROMPTS, columns)
        if not prompt:
            raise InputError(
                f"task.file={self.file!r}: no column with prompts among {', '.join(columns)}; set task.prompt_column"
            )
        for name in self.masks:
            _column("masks", name, (), columns)
        found = _entries(path, rows, image, prompt, _column("", "", IDS, columns), self.masks)
        return build_task(self, found, f"task.file={self.file!r}")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a table as flat dicts; missing values are left out.

    Raises InputError for a file that is missing, damaged or of another kind.
    """
    where = f"task.file={str(path)!r}"
    if not path.is_file():
        raise InputError(f"{where}: is no file; expected a CSV, Parquet or JSON file")
    kind = path.suffix.lower()
    try:
        if kind == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
            lists = [content] if isinstance(content, list) else [v for v in content.values() if isinstance(v, list)]
            if len(lists) != 1 or not all(isinstance(row, dict) for row in lists[0]):
                raise InputError(f"{where}: expected a list of objects, one for each problem")
            rows = [flat(row) for row in lists[0]]
        elif kind in (".csv", ".parquet"):
            import pandas as pd  # slow to import, and for tables only

            table = pd.read_csv(path) if kind == ".csv" else pd.read_parquet(path)
            rows = [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]
        else:
            raise InputError(f"{where}: expected a file that ends in .csv, .parquet or .json")
    except ImportError as error:
        raise InputError(
            f"{where}: reading Parquet needs the package pyarrow; install it, or save the table as CSV"
        ) from error
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where}: cannot be read ({' '.join(str(error).split())}); expected a table") from error
    return [{name: value for name, value in row.items() if value is not None and value == value} for row in rows]


def _column(setting: str, given: str, usual: tuple[str, ...], columns: list[str]) -> str:
    """The name of a column; empty when there is none. Raises InputError for a given one that is not there."""
    if given and given not in columns:
        raise InputError(f"task.{setting}={given!r}: expected one of {', '.join(columns)}")
    return given or next((name for name in usual if name in columns), "")


def _is_file(path: Path) -> bool:
    """Whether there is such a file; no for names that no file can have."""
    try:
        return path.is_file()
    except OSError:  # too long
        return False


def _entries(
    path: Path, rows: list[dict[str, Any]], image: str, prompt: str, named: str, masks: list[str]
) -> Iterator[Entry | Broken]:
    for number, row in enumerate(rows):
        where = f"{str(path)!r}, row {number + 1}"
        name = str(row.get(named, number)) if named else str(number)
        if not isinstance(row.get(prompt), str):
            yield Broken(f"{where}: {prompt}={row.get(prompt)!r}, expected a prompt")
            continue
        try:
            file = _file_in(row, image, path.parent, where) if image else None
            regions = tuple(_file_in(row, mask, path.parent, where) for mask in masks)
        except Broken as error:
            yield error
            continue
        fields = {k: v for k, v in row.items() if k not in (prompt, image, *masks)}
        yield Entry(name, where, file, row[prompt], fields, regions)


def _file_in(row: dict[str, Any], column: str, folder: Path, where: str) -> Path:
    """The file that a column names. Raises Broken when it is missing or outside the folder of the table."""
    given, root = row.get(column), folder.resolve()
    file = folder / given if isinstance(given, str) and given else None
    if file is None or not _is_file(file):
        raise Broken(f"{where}: {column}={given!r:.300}, expected the path of an image")
    if root not in file.resolve().parents:
        raise Broken(f"{where}: {column}={given!r} leads out of {str(root)!r}, expected a file inside it")
    return file
