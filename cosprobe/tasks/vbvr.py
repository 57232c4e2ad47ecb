"""Problems as folders in the layout of VBVR: `<task>/<problem>/` with five files.

`first_frame.png`, `final_frame.png`, `ground_truth.mp4` (MPEG-4, 16 frames a second), `prompt.txt` and `metadata.json`
(older exports call it `question_metadata.json`). What the data factory of VBVR writes (repositories
VBVR-DataFactory/*_data-generator) was the model, and is read back by the same function. Departures: no time stamp, so
a problem gives the same metadata on every machine, and the labels stand in `parameters` beside the answer.

The video is lossy (as in VBVR); the two pictures are exact.
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
from cosprobe.runtime import make_folder, whole_file
from cosprobe.tasks.task import Problem, Task

FIRST, FINAL, VIDEO, PROMPT = "first_frame.png", "final_frame.png", "ground_truth.mp4", "prompt.txt"
METADATA = ("metadata.json", "question_metadata.json")
RATE = 16  # frames a second
QUALITY = 1  # quantiser of MPEG-4, 1 (best) to 31


@dataclass(frozen=True)
class VbvrProblem:
    """What a folder holds. answer: `parameters.answer`, None where the export has none. video: None where the
    generator ran with videos off. metadata: the whole file."""

    name: str
    prompt: str
    answer: int | None
    first: UInt8[np.ndarray, "height width 3"]
    final: UInt8[np.ndarray, "height width 3"]
    video: UInt8[np.ndarray, "frame height width 3"] | None
    metadata: dict[str, Any] = field(repr=False)


def write_problem(task: Task, problem: Problem, folder: str | Path) -> Path:
    """Writes a problem below the data set `folder`; returns its own folder, `<folder>/<task>/<task>_..._<index>`.

    Every file is written whole or not at all, the metadata last: a folder with metadata is complete. Writing a
    problem again replaces its files. Raises ValueError when the place lies outside `folder`, through a name or a link.
    """
    root = Path(folder)
    name = f"{problem.task}_{problem.kind}_{problem.split}_{problem.index:08d}"
    for part in (problem.task, name):
        if Path(part).name != part:
            raise InputError(f"{part!r}: leads out of its folder; expected a name without folders in it")
    place = _within(root, root / problem.task / name)
    for file in (FIRST, FINAL, VIDEO, PROMPT, METADATA[0]):
        _within(place, place / file)
    make_folder(place)
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
    _write(place / FIRST, lambda part: Image.fromarray(task.image(problem)).save(part, format="png"))
    _write(place / FINAL, lambda part: Image.fromarray(video[-1]).save(part, format="png"))
    _write(place / VIDEO, lambda part: _encode(part, video))
    _write(place / PROMPT, lambda part: part.write_text(problem.prompt, encoding="utf-8"))
    _write(place / METADATA[0], lambda part: part.write_text(json.dumps(metadata, indent=2), encoding="utf-8"))
    return place


def read_problem(folder: str | Path) -> VbvrProblem:
    """Reads the folder of one problem, written here or by VBVR's own generators.

    Raises ValueError when a file is missing or damaged, or is a link that leads out of the folder.
    """
    place = Path(folder)
    if not place.is_dir():
        raise InputError(f"{str(place)!r}: expected the folder of one problem, as in <task>/<task>_00000000")
    note = next((name for name in METADATA if (place / name).is_file()), METADATA[0])
    metadata = _read(place, note, lambda file: json.loads(file.read_text(encoding="utf-8")))
    parameters = metadata.get("parameters") if isinstance(metadata, dict) else None
    if not isinstance(parameters, dict):
        raise InputError(f"{str(place / note)!r}: expected an object with `parameters`; export the problem again")
    answer = parameters.get("answer")
    if answer is not None and type(answer) is not int:
        raise InputError(f"{str(place / note)!r}: parameters.answer={answer!r}: expected a whole number or null")
    first, final = (_read(place, name, _picture) for name in (FIRST, FINAL))
    video = _read(place, VIDEO, _decode) if (place / VIDEO).is_symlink() or (place / VIDEO).exists() else None
    if final.shape != first.shape or (video is not None and video.shape[1:] != first.shape):
        raise InputError(f"{str(place)!r}: pictures and video differ in size; export the problem again")
    prompt = _read(place, PROMPT, lambda file: file.read_text(encoding="utf-8")).strip()
    return VbvrProblem(str(metadata.get("task_id", place.name)), prompt, answer, first, final, video, metadata)


def _within(root: Path, path: Path) -> Path:
    """`path`, if it lies below `root` once links and `..` are followed."""
    if root.resolve() not in path.resolve().parents:
        raise InputError(f"{str(path)!r}: leads out of {str(root)!r}; expected a path inside it")
    return path


def _write(path: Path, save: Callable[[Path], Any]) -> None:
    with whole_file(path) as part:
        save(_within(path.parent, part))


def _read(place: Path, name: str, load: Callable[[Path], Any]) -> Any:
    """`load(place / name)`; ValueError instead of whatever a file that is missing or damaged raises."""
    file = _within(place, place / name)
    try:
        return load(file)
    except FileNotFoundError:
        raise InputError(f"{str(place)!r}: expected a problem in VBVR's layout, found no {name}") from None
    except (OSError, ValueError, SyntaxError, av.FFmpegError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{str(file)!r}: cannot be read ({reason}); expected it as VBVR writes it") from error


def _picture(file: Path) -> np.ndarray:
    with Image.open(file) as picture:
        return np.asarray(picture.convert("RGB"))


def _encode(path: Path, video: np.ndarray) -> None:
    with av.open(str(path), "w", format="mp4") as film:
        stream = film.add_stream("mpeg4", rate=RATE, options={"qmin": str(QUALITY), "qmax": str(QUALITY)})
        stream.height, stream.width, stream.pix_fmt = *video.shape[1:3], "yuv420p"
        for frame in video:
            film.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        film.mux(stream.encode())


def _decode(file: Path) -> np.ndarray:
    with av.open(str(file)) as film:
        if not film.streams.video:
            raise InputError("no video in it")
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
    if not frames:
        raise InputError("no frames in it")
    return np.stack(frames)
