"""Reads and writes problems in the folder layout of VBVR: `<task>/<problem>/` with five files.

The files are `first_frame.png`, `final_frame.png`, `ground_truth.mp4` (MPEG-4, 16 frames per second), `prompt.txt` and
`metadata.json` (`question_metadata.json` in older exports). The layout is that of the VBVR data factory (repositories
VBVR-DataFactory/*_data-generator). `read_problem` reads folders from either source.

Departures: there is no time stamp, so the metadata of a problem are the same on every machine. `parameters` holds the
labels as well as the answer.
The video is lossy, as in VBVR. The two images are lossless.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from cosprobe.errors import InputError
from cosprobe.files import make_folder, whole_file
from cosprobe.tasks.regions import Mask
from cosprobe.tasks.task import Problem, Task
from cosprobe.video_files import read_video, write_video

FIRST, FINAL, VIDEO, PROMPT = "first_frame.png", "final_frame.png", "ground_truth.mp4", "prompt.txt"
METADATA = ("metadata.json", "question_metadata.json")


@dataclass(frozen=True)
class VbvrProblem:
    """The content of the folder of one problem.

    answer: `parameters.answer` of the metadata, None when there is none. first, final: first and last frame.
    video: None when the folder has no video (VBVR generators can run without). metadata: content of the metadata file.
    """

    name: str
    prompt: str
    answer: int | None
    first: UInt8[np.ndarray, "height width 3"]
    final: UInt8[np.ndarray, "height width 3"]
    video: UInt8[np.ndarray, "frame height width 3"] | None
    metadata: dict[str, Any] = field(repr=False)


def write_problem(task: Task, problem: Problem, folder: str | Path) -> Path:
    """Writes a problem into the data set `folder` and returns the problem's folder,
    `<folder>/<task>/<task>_<kind>_<split>_<index>`.

    Every file is written atomically, the metadata last, so a folder with metadata is complete. Existing files of the
    problem are replaced.
    Raises InputError when a name or a link leads out of `folder`, when a file cannot be written, and for regions that
    are masks: the layout has no place for them.
    """
    if any(isinstance(region, Mask) for region in problem.regions):
        raise InputError(f"{problem.name}: its regions are masks, expected boxes; leave out task.masks")
    root = Path(folder)
    name = f"{problem.task}_{problem.kind}_{problem.split}_{problem.index:08d}"
    for part in (problem.task, name):
        if Path(part).name != part:
            raise InputError(f"{part!r}: points outside its folder; expected a name without / or ..")
    path = within(root, root / problem.task / name)
    for file in (FIRST, FINAL, VIDEO, PROMPT, METADATA[0]):
        within(path, path / file)
    make_folder(path)
    video = task.video(problem)
    metadata = {
        "task_id": name,
        "generator": problem.task,
        "parameters": {
            "answer": problem.answer,
            "solutions": list(task.solutions(problem)),
            "kind": problem.kind,
            "split": problem.split,
            "index": problem.index,
            "labels": problem.labels,
            "difficulty": problem.difficulty,
            "regions": problem.regions,
        },
        "param_hash": problem.key,
    }
    _write(path / FIRST, lambda part: Image.fromarray(task.image(problem)).save(part, format="png"))
    _write(path / FINAL, lambda part: Image.fromarray(video[-1]).save(part, format="png"))
    _write(path / VIDEO, lambda part: write_video(part, video))
    _write(path / PROMPT, lambda part: part.write_text(problem.prompt, encoding="utf-8"))
    _write(path / METADATA[0], lambda part: part.write_text(json.dumps(metadata, indent=2), encoding="utf-8"))
    return path


def read_problem(folder: str | Path) -> VbvrProblem:
    """Reads the folder of one problem, written by `write_problem` or by a generator of VBVR.

    Raises InputError when a file is missing or damaged, or is a link that leads out of the folder.
    """
    path = Path(folder)
    if not path.is_dir():
        raise InputError(f"{str(path)!r}: expected the folder of one problem, as in <task>/<task>_00000000")
    note = next((name for name in METADATA if (path / name).is_file()), METADATA[0])
    metadata = read_file(path, note, load_json)
    parameters = metadata.get("parameters") if isinstance(metadata, dict) else None
    if not isinstance(parameters, dict):
        raise InputError(f"{str(path / note)!r}: expected a JSON object with `parameters`; export the problem again")
    answer = parameters.get("answer")
    if answer is not None and type(answer) is not int:
        raise InputError(f"{str(path / note)!r}: parameters.answer={answer!r}: expected a whole number or null")
    first, final = (read_file(path, name, _picture) for name in (FIRST, FINAL))
    video = read_file(path, VIDEO, read_video) if (path / VIDEO).is_symlink() or (path / VIDEO).exists() else None
    if final.shape != first.shape or (video is not None and video.shape[1:] != first.shape):
        raise InputError(f"{str(path)!r}: images and video differ in size; export the problem again")
    prompt = read_file(path, PROMPT, load_text).strip()
    return VbvrProblem(str(metadata.get("task_id", path.name)), prompt, answer, first, final, video, metadata)


def within(root: Path, path: Path) -> Path:
    """Returns `path`. Raises InputError unless it is inside `root` after links and `..` are resolved."""
    if root.resolve() not in path.resolve().parents:
        raise InputError(f"{str(path)!r}: points outside {str(root)!r}; expected a path inside it")
    return path


def _write(path: Path, save: Callable[[Path], Any]) -> None:
    with whole_file(path) as part:
        save(within(path.parent, part))


def read_file(path: Path, name: str, load: Callable[[Path], Any], root: Path | None = None) -> Any:
    """Returns `load(path / name)`.

    root: the folder that links may not lead out of; default: `path`. Raises InputError when the file is missing or
    damaged, or outside `root`.
    """
    file = within(root or path, path / name)
    try:
        return load(file)
    except FileNotFoundError:
        raise InputError(f"{str(path)!r}: has no {name}, expected a problem in VBVR's layout") from None
    except (OSError, ValueError, SyntaxError, RecursionError, av.FFmpegError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{str(file)!r}: cannot be read ({reason}); expected a file as VBVR writes it") from error


def load_text(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def load_json(file: Path) -> Any:
    return json.loads(load_text(file))


def _picture(file: Path) -> np.ndarray:
    with Image.open(file) as picture:
        return np.asarray(picture.convert("RGB"))
