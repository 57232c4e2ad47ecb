"""The task `select`, for perception before action: the prompt names an object and a box, and the video moves the object
into the box.

Four hollow boxes of different colours are in the corners, and two to five different objects lie between them. The
answer needs both image and prompt: the words must first be matched with positions in the image (targets `object` and
`box`), then the motion can be drawn (`move`, `answer`). Lengths are in units of a 64 x 64 board, so every image size
shows the same problem. Each box is one region, 2 x 2 tokens of the mini model.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache

import numpy as np
from jaxtyping import Bool, Float, UInt8

from cosprobe.errors import InputError
from cosprobe.tasks.splits import split_of
from cosprobe.tasks.task import (
    ParsedAnswer,
    Problem,
    Role,
    Target,
    check_counts,
    check_request,
    check_video,
    check_video_size,
    distinct,
    draw_seed,
)

BOARD, BOX, ROOM, OBJECT = 64, 16, 12, 10  # sides in units: board, box, inside of a box, object
CELLS = [(y, x) for y in (21, 32, 43) for x in (21, 32, 43)]  # centres of objects; neither these nor boxes overlap
CORNERS = [(y, x) for y in (8, 56) for x in (8, 56)]  # centres of the boxes
REGIONS = tuple(((x - 8) / 64, (y - 8) / 64, (x + 8) / 64, (y + 8) / 64) for y, x in CORNERS)
COLOURS, SHAPES = ("red", "green", "blue", "yellow"), ("disc", "bar", "dash")
PALETTE = np.array([[220, 40, 40], [30, 160, 60], [40, 80, 220], [250, 200, 0], [236, 236, 230]], dtype=np.uint8)
PAINT, LIGHT = PALETTE / np.float32(255), len(COLOURS)  # the palette in [0, 1]; index of the board's colour
PHRASES = (
    "move the {colour} {shape} into the {box} box",
    "put the {colour} {shape} in the {box} box",
    "the {box} box is where the {colour} {shape} must go",
    "the {colour} {shape} belongs in the {box} box",
    "slide the {colour} {shape} over to the {box} box and leave it there",
    "into the {box} box goes the {colour} {shape}",
)
REST, FEWEST, MOST = 2, 2, 5  # repetitions of the final frame, as in the maze; range of the number of objects
CLEAR = 0.39  # the largest squared error of an object that counts as seen, as a share of its contrast
ARRANGEMENTS = 8  # number of draws of the objects' cells, of which one is kept (see `draw_scene`)


@dataclass(frozen=True)
class Scene:
    """The description of a problem.

    boxes: colour of the box at each of CORNERS. objects: (cell, identity) of each object, where cells are numbered row
    by row and identity = 3 x colour + shape. named: index into `objects` of the object that the prompt names.
    corner: corner of the named box. phrase: index of the prompt in PHRASES.
    """

    boxes: tuple[int, ...]
    objects: tuple[tuple[int, int], ...]
    named: int
    corner: int
    phrase: int


@dataclass(frozen=True)
class Select:
    """The task `select`. Fields as in `SelectConfig`. Raises InputError for an invalid value."""

    image_size: int = 64
    frames: int = 13
    objects: tuple[int, ...] = (FEWEST, MOST)
    seed: int = 0
    name: str = field(default="select", init=False)
    kinds: tuple[str, ...] = field(default=("select",), init=False)
    candidates: int = field(default=4, init=False)
    regions: int = field(default=4, init=False)

    def __post_init__(self) -> None:
        check_video_size(self, 5, chunks=True)
        if len(self.objects) != 2 or not FEWEST <= self.objects[0] <= self.objects[1] <= MOST:
            raise InputError(f"task.objects={list(self.objects)}: expected [fewest, most], from {FEWEST} to {MOST}")

    @property
    def targets(self) -> tuple[Target, ...]:
        """The labels that probes decode."""
        return (
            Target("answer", 4, "candidate", Role.ANSWER, self.kinds),
            Target("model_answer", 4, "candidate", Role.MODEL_ANSWER, self.kinds),
            Target("object", len(CELLS), "problem", Role.PERCEPTION, self.kinds),  # cell of the named object
            Target("box", len(COLOURS), "problem", Role.PERCEPTION, self.kinds),  # colour of the named box
            Target("corners", len(COLOURS), "region", Role.PERCEPTION, self.kinds),  # colour of the box there
            Target("move", 4, "problem", Role.PERCEPTION, self.kinds),  # first direction: up, down, left, right
            Target("objects", MOST - FEWEST + 1, "problem", Role.NUISANCE, self.kinds),
            Target("control", 4, "candidate", Role.CONTROL, self.kinds),
        )

    def problems(self, split: str, count: int, kind: str | None = None) -> list[Problem]:
        """The first `count` distinct problems of a split. There is one kind."""
        check_request(split, count, kind, self.kinds)
        entropy = draw_seed(self.seed, split, "select")
        return distinct((self._draw(entropy, index) for index in itertools.count()), split, count)

    def _draw(self, entropy: int, index: int) -> Problem:
        rng = np.random.default_rng([entropy, index])
        scene = draw_scene(int(rng.integers(self.objects[0], self.objects[1] + 1)), rng)
        key = canonical_key(scene)
        return _problem(scene, split_of(key), index, key, int(rng.integers(4)))

    def swapped(self, problem: Problem, *, object: int | None = None, box: int | None = None) -> Problem:
        """The same image and wording with another object or box named. Use: do videos follow the prompt?

        object: index into `problem.layout.objects`. box: corner of the box to name, which is the new answer.
        Name, split and control do not change, so a sample keeps its noise seed. Key and other labels are those of the
        new problem. Its key may belong to another split, so do not fit anything to it.
        Raises InputError for an index out of range.
        """
        scene: Scene = problem.layout
        named = scene.named if object is None else object
        corner = scene.corner if box is None else box
        for name, value, end in (("object", named, len(scene.objects)), ("box", corner, len(CORNERS))):
            if not 0 <= value < end:
                raise InputError(f"{name}={value}: expected an index of the problem, 0 to {end - 1}")
        other = replace(scene, named=named, corner=corner)
        return _problem(other, problem.split, problem.index, canonical_key(other), problem.labels["control"])

    def image(self, problem: Problem) -> UInt8[np.ndarray, "height width 3"]:
        """The first frame: boxes in the corners, objects between them."""
        return PALETTE[_film(problem.layout, self.image_size, _way(problem.layout, self.frames)[:1])[0]]

    def video(self, problem: Problem) -> UInt8[np.ndarray, "frame height width 3"]:
        """The reference video. The named object moves at constant speed into the box, first along the axis with the
        longer distance (horizontally if both are equal), then along the other. It is drawn over other objects."""
        return PALETTE[_film(problem.layout, self.image_size, _way(problem.layout, self.frames))]

    def workspace(self, problem: Problem) -> Bool[np.ndarray, "height width"]:
        """Mask of the pixels that a solution may change: the ways of all objects to all boxes."""
        mask = np.zeros((self.image_size, self.image_size), dtype=bool)
        for (cell, _), corner in itertools.product(problem.layout.objects, range(4)):
            for leg in itertools.pairwise(_bends(cell, corner)):
                mask[_cut(leg, OBJECT, self.image_size)] = True
        return mask

    def solutions(self, problem: Problem) -> tuple[int, ...]:
        """The corner of the named box."""
        return (problem.layout.corner,)

    def plausible_answers(self, problem: Problem) -> tuple[int, ...]:
        """All four corners. The image alone excludes none of them."""
        return tuple(range(self.candidates))

    def parse(self, problem: Problem, video: Float[np.ndarray, "frame height width 3"]) -> ParsedAnswer:
        """Reads the last frame of a video with values in [0, 1]; `path` compares all frames with the reference video.

        The inside of each box is compared with templates: empty, and each of the 12 objects, up to one unit off the
        centre. The answer is the box whose best template is the named object. It is None when no box or several boxes
        hold the named object, when a box holds anything else, or when the named object is seen outside the boxes.
        Scores: squared error of the empty template minus that of the named object; 1 for a perfect image of the object.
        """
        check_video(video)
        scene: Scene = problem.layout
        wanted = scene.objects[scene.named][1]
        pixels = ((np.arange(BOARD) + 0.5) * video.shape[1] / BOARD).astype(int)  # one pixel per unit
        seen = np.asarray(video, dtype=np.float32)[:, pixels[:, None], pixels]
        rooms = np.stack([seen[-1][_cut([corner], ROOM)] for corner in CORNERS])
        added, objects = (rooms - PAINT[LIGHT]).reshape(len(CORNERS), -1), _templates()
        energy = np.square(objects).sum(-1)  # [identity, shift]
        excess = energy - 2 * np.einsum("rp,isp->ris", added, objects)  # squared error minus that of an empty box
        least, best = excess.min((1, 2)), excess.min(2).argmin(1)
        clear = least + np.square(added).sum(-1) < CLEAR * energy[best, 0]  # the squared error is small enough
        found = (least < 0) & clear & (best == wanted)
        settled = found.sum() == 1 and (least[~found] >= 0).all() and not _outside(scene, seen[-1])
        scores = tuple(float(score) for score in (-excess / energy)[:, wanted].max(-1))
        return ParsedAnswer(int(found.argmax()) if settled else None, scores, _agreement(scene, seen, self.frames))


@dataclass
class SelectConfig:
    """Settings of `Select`. Raises InputError for an invalid value."""

    problems: int = 600
    "Number of problems, over all splits."
    seeds: int = 1
    "Number of noise seeds of each problem."
    image_size: int = 64
    "Side of the image in pixels, a multiple of 16 and at least 64."
    frames: int = 13
    "Number of video frames, 4k + 1 and at least 5."
    objects: list[int] = field(default_factory=lambda: [FEWEST, MOST])
    "Fewest and most objects on the board, from 2 to 5."
    seed: int = 0
    "Random seed of the problems."

    def __post_init__(self) -> None:
        check_counts(self)
        self.build()

    def build(self) -> Select:
        """The task with these settings."""
        return Select(self.image_size, self.frames, tuple(self.objects), self.seed)


FAMILY = SelectConfig


def draw_scene(count: int, rng: np.random.Generator) -> Scene:
    """A random scene with `count` objects.

    The named object and box are drawn last and independently of the image, so the image cannot predict them. Of
    ARRANGEMENTS arrangements, the one with the fewest objects in the same row or column is kept. The moving object then
    passes over another one less often (measured: in 28 of 100 problems instead of 41).
    """
    arrangements = [divmod(rng.permutation(len(CELLS))[:count], 3) for _ in range(ARRANGEMENTS)]
    rows, columns = max(arrangements, key=lambda drawn: sum(len(set(lines)) for lines in drawn))
    identities = rng.permutation(len(COLOURS) * len(SHAPES))[:count]
    objects = sorted(zip((rows * 3 + columns).tolist(), identities.tolist(), strict=True))
    boxes = tuple(rng.permutation(len(COLOURS)).tolist())
    return Scene(boxes, tuple(objects), int(rng.integers(count)), int(rng.integers(4)), int(rng.integers(len(PHRASES))))


def canonical_key(scene: Scene) -> str:
    """A hash that is the same for a scene and its images under the 8 symmetries of the square, and for all wordings."""
    board = [-1] * len(CELLS) + list(scene.boxes)
    for cell, identity in scene.objects:
        board[cell] = identity
    values = min([board[place] for place in view] for view in _symmetries())
    rows = [values[start : start + 3] for start in range(0, len(CELLS), 3)]
    seen = [rows, [values[len(CELLS) : len(CELLS) + 2], values[len(CELLS) + 2 :]]]
    named = scene.objects[scene.named][1], scene.boxes[scene.corner]
    return hashlib.sha256(repr((named, seen)).encode()).hexdigest()[:16]


@cache
def _symmetries() -> list[list[int]]:
    """For each symmetry of the square, the cells and then the boxes (numbered after the cells) in their new order."""
    grids = np.arange(len(CELLS)).reshape(3, 3), len(CELLS) + np.arange(len(CORNERS)).reshape(2, 2)
    views = [grids, (grids[0].T, grids[1].T)]
    return [[int(at) for grid in view for at in np.rot90(grid, turns).flat] for view in views for turns in range(4)]


def _problem(scene: Scene, split: str, index: int, key: str, control: int | tuple[int, ...]) -> Problem:
    (cell, identity), box = scene.objects[scene.named], scene.boxes[scene.corner]
    words = PHRASES[scene.phrase].format(colour=COLOURS[identity // 3], shape=SHAPES[identity % 3], box=COLOURS[box])
    start, turn, end = _bends(cell, scene.corner)
    axis = int(turn[0] == start[0])
    labels: dict[str, int | tuple[int, ...]] = {
        "answer": scene.corner, "object": cell, "box": box, "corners": scene.boxes,
        "move": 2 * axis + (turn[axis] > start[axis]), "objects": len(scene.objects) - FEWEST, "control": control,
    }  # fmt: skip
    difficulty = {"objects": len(scene.objects), "distance": abs(end[0] - start[0]) + abs(end[1] - start[1])}
    return Problem("select", "select", split, index, key, words, scene.corner, labels, difficulty, REGIONS, scene)


def _bends(cell: int, corner: int) -> list[tuple[int, int]]:
    """Start, turn and end of the way from a cell into a box: longer distance first, horizontally if both are equal."""
    start, end = CELLS[cell], CORNERS[corner]
    sideways = abs(end[1] - start[1]) >= abs(end[0] - start[0])
    return [start, (start[0], end[1]) if sideways else (end[0], start[1]), end]


def _way(scene: Scene, frames: int) -> list[tuple[int, int]]:
    """Centre of the named object in each frame, in whole units."""
    bends = np.array(_bends(scene.objects[scene.named][0], scene.corner))
    passed = np.cumsum([0, *np.abs(np.diff(bends, axis=0)).sum(1)])
    walked = np.minimum(1, np.arange(frames) / (frames - 1 - REST)) * passed[-1]
    y, x = (np.floor(np.interp(walked, passed, at) + 0.5).astype(int).tolist() for at in bends.T)
    return list(zip(y, x, strict=True))


def _cut(points: Iterable[tuple[int, int]], width: int, size: int = BOARD) -> tuple[slice, slice]:
    """The pixels covered by a square of `width` units whose centre moves from point to point."""
    edges = [edge for at in zip(*points, strict=True) for edge in (min(at) - width / 2, max(at) + width / 2)]
    top, bottom, left, right = (int(edge * size / BOARD + 0.5) for edge in edges)
    return slice(top, bottom), slice(left, right)


@lru_cache
def _shapes(height: int, width: int) -> Bool[np.ndarray, "shape height width"]:
    """Masks of the shapes. Any two differ in at least a third of the pixels, and none has fine detail."""
    y, x = np.ix_(*((np.arange(side) + 0.5) / side * 2 - 1 for side in (height, width)))
    return np.stack([y**2 + x**2 <= 1, np.abs(x) <= 0.4 + 0 * y, np.abs(y) <= 0.4 + 0 * x])


def _film(scene: Scene, size: int, way: list[tuple[int, int]]) -> UInt8[np.ndarray, "frame size size"]:
    """Index into PALETTE of every pixel. Frame i shows the named object with its centre at way[i]."""
    board, moving = np.full((size, size), LIGHT, dtype=np.uint8), scene.objects[scene.named][1]
    for corner, colour in zip(CORNERS, scene.boxes, strict=True):
        board[_cut([corner], BOX, size)] = colour
        board[_cut([corner], ROOM, size)] = LIGHT
    film = np.repeat(board[None], len(way), axis=0)
    drawn = [(film, CELLS[cell], identity) for cell, identity in scene.objects if identity != moving]
    drawn += [(frame, centre, moving) for frame, centre in zip(film, way, strict=True)]
    for frames, centre, identity in drawn:
        patch = frames[(..., *_cut([centre], OBJECT, size))]
        patch[..., _shapes(*patch.shape[-2:])[identity % 3]] = identity // 3
    return film


@lru_cache
def _templates() -> Float[np.ndarray, "identity shift value"]:
    """The difference between a box with an object and an empty box, for each object, centred and up to one unit off."""
    shapes, shifts = _shapes(OBJECT, OBJECT), itertools.product((0, 1, 2), repeat=2)
    masks = np.stack([np.pad(shapes, ((0, 0), (y, 2 - y), (x, 2 - x))) for y, x in shifts], axis=1)
    added = (PAINT[:LIGHT] - PAINT[LIGHT])[:, None, None, None, None] * masks[..., None]
    return added.reshape(len(COLOURS) * len(SHAPES), masks.shape[1], -1)


def _outside(scene: Scene, frame: Float[np.ndarray, "height width 3"]) -> bool:
    """Whether the named object is seen outside the boxes. Cells of other objects of its colour are ignored."""
    wanted = scene.objects[scene.named][1]
    hit = (np.square(PAINT).sum(1) - 2 * frame @ PAINT.T).argmin(-1) == wanted // 3  # nearest colour of the palette
    alike = [CELLS[cell] for cell, identity in scene.objects if identity != wanted and identity // 3 == wanted // 3]
    for centre, width in (*((corner, BOX) for corner in CORNERS), *((cell, OBJECT) for cell in alike)):
        hit[_cut([centre], width)] = False
    mask = _shapes(OBJECT, OBJECT)[wanted % 3].ravel()
    windows = np.lib.stride_tricks.sliding_window_view(hit.astype(np.float32), (OBJECT, OBJECT))
    return bool((windows.reshape(-1, mask.size) @ mask).max() > 0.6 * mask.sum())


def _agreement(scene: Scene, seen: Float[np.ndarray, "frame height width 3"], frames: int) -> float:
    """Intersection over union of the pixels that changed since the first frame and those that should, in all frames."""
    way = _way(scene, frames)
    at = np.rint(np.linspace(frames - 1, 0, len(seen))[::-1]).astype(int)  # at the same relative time
    film = _film(scene, BOARD, [way[0], *(way[frame] for frame in at)])
    change, miss = (np.einsum("fyxc,fyxc->fyx", off, off) for off in (seen - PAINT[film[0]], seen - PAINT[film[1:]]))
    wanted = film[1:] != film[0]
    return float((wanted & (miss < change)).sum() / max(1, (wanted | (change > 0.25)).sum()))
