"""`task=folder`: one folder for each problem, as VBVR, VBVR-Pro, VBVR-MultiStep and VMEvalKit write them.

A folder with `first_frame.png` or a metadata file (`metadata.json`, or `question_metadata.json` in older exports) is a
problem. It may be nested at any depth, and its name may be there again elsewhere: a problem is known by its path.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from cosprobe.errors import InputError
from cosprobe.tasks.disk import DiskTask, Entry
from cosprobe.tasks.entries import DiskConfig, build_task
from cosprobe.tasks.pictures import Broken
from cosprobe.tasks.vbvr import FINAL, FIRST, METADATA, PROMPT, VIDEO, load_json, load_text, read_file, within


@dataclass
class FolderConfig(DiskConfig):
    """Problems in folders, such as those of VBVR. Raises InputError for a value out of range."""

    family: ClassVar[str] = "folder"
    root: str = ""
    "Folder of the problems; each has first_frame.png, prompt.txt and metadata.json."

    def build(self) -> DiskTask:
        """Reads the problems. Raises InputError for a folder without any, and as `build_task` does."""
        if not self.root:
            raise InputError("task.root='': expected task.root=FOLDER, a folder of problem folders")
        root = Path(os.path.expanduser(self.root))
        if not root.is_dir():
            raise InputError(f"task.root={self.root!r}: is no folder; expected a folder of problem folders")
        return build_task(self, read_folders(root, self.masks), f"task.root={self.root!r}")


def read_folders(root: Path, masks: Sequence[str] = ()) -> Iterator[Entry | Broken]:
    """The problems below a folder, in the order of their paths. Links to folders are not followed.

    masks: names of the files of regions, in the folder of each problem. The last frame is for folders without a video.
    """
    for place, folders, files in os.walk(root):
        folders.sort()
        here = Path(place)
        noted = [name for name in METADATA if name in files]
        if noted or FIRST in files:
            reference = next((name for name in (VIDEO, FINAL) if name in files), "")
            yield _entry(root, here, noted[0] if noted else "", masks, reference)
        elif not files and not folders and here != root:
            yield Broken(f"{str(here)!r}: is empty, expected {FIRST}, {PROMPT} and {METADATA[0]}")


def _entry(root: Path, folder: Path, noted: str, masks: Sequence[str], reference: str) -> Entry | Broken:
    try:
        read_file(folder, FIRST, Path.stat, root)
        prompt = read_file(folder, PROMPT, load_text, root).strip()
        content = read_file(folder, noted or METADATA[0], load_json, root)
        regions = tuple(within(root, folder / name) for name in masks)
        shown = within(root, folder / reference) if reference else None
    except InputError as error:
        return Broken(str(error))
    if not isinstance(content, dict):
        return Broken(
            f"{str(folder / (noted or METADATA[0]))!r}: holds a {type(content).__name__}, expected a JSON object"
        )
    try:
        fields = flat(content)
    except RecursionError:
        return Broken(f"{str(folder / (noted or METADATA[0]))!r}: objects within objects, too deep to be read")
    image = folder / FIRST
    video, final = (shown, None) if reference == VIDEO else (None, shown)
    return Entry(folder.relative_to(root).as_posix(), str(image), image, prompt, fields, regions, video, final)


def flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested metadata as dotted paths. Lists stay as they are."""
    found: dict[str, Any] = {}
    for name, value in content.items():
        path = f"{prefix}{name}"
        found |= flat(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return found
