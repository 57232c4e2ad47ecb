"""Perception before action: the prompt names an object and a box, the video moves the one into the other.

Four hollow boxes of different colours stand in the corners, two to five different objects lie between them. The
picture leaves all corners open and the prompt alone names none: words must first be bound to places in the picture
(targets `object` and `box`), then the way can be drawn (`move`, `answer`). Lengths are in units of a 64 x 64 board,
so every image size shows the same problem; a box is one region, 2 x 2 tokens of the mini model.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float, UInt8

from cosprobe.errors import InputError
from cosprobe.tasks.task import Problem, Readout, Target, check_counts, check_request, distinct, draw_seed, split_of

BOARD, BOX, ROOM, OBJECT = 64, 16, 12, 10  # units a side: board, box, room inside its rim, object
CELLS = [(y, x) for y in (21, 32, 43) for x in (21, 32, 43)]  # centres: objects touch neither each other nor boxes
CORNERS = [(y, x) for y in (8, 56) for x in (8, 56)]  # centres of the boxes
REGIONS = tuple(((x - 8) / 64, (y - 8) / 64, (x + 8) / 64, (y + 8) / 64) for y, x in CORNERS)
COLOURS, SHAPES = ("red", "green", "blue", "yellow"), ("disc", "bar", "dash")
PALETTE = np.array([[220, 40, 40], [30, 160, 60], [40, 80, 220], [250, 200, 0], [236, 236, 230]], dtype=np.uint8)
PAINT, LIGHT = PALETTE / np.float32(255), len(COLOURS)  # the palette as readouts see it, the colour of the board
PHRASES = (
    "move the {colour} {shape} into the {box} box",
    "put the {colour} {shape} in the {box} box",
    "the {box} box is where the {colour} {shape} must go",
    "the {colour} {shape} belongs in the {box} box",
    "slide the {colour} {shape} over to the {box} box and leave it there",
    "into the {box} box goes the {colour} {shape}",
)
REST, FEWEST, MOST = 2, 2, 5  # frames the finished move is shown, as in the maze; objects on the board
CLEAR = 0.39  # an object is read when less than this share of its own contrast is left unexplained
ARRANGEMENTS = 8  # draws of the objects' cells, of which the least crowded is kept


@dataclass(frozen=True)
class Scene:
    """boxes: colour of the box at each of CORNERS. objects: (cell, identity) of each; cells row by row, identity =
    3 x colour + shape. named: index into objects. corner: of the named box. phrase: wording of the prompt."""

    boxes: tuple[int, ...]
    objects: tuple[tuple[int, int], ...]
    named: int
    corner: int
    phrase: int


@dataclass(frozen=True)
class Select:
    """The task. objects: fewest and most on the board, from 2 to 5. image_size: pixels a side, a multiple of 16 and
    at least 64. frames: 4k + 1. seed: another seed is another world."""

    image_size: int = 64
    frames: int = 13
    objects: tuple[int, ...] = (FEWEST, MOST)
    seed: int = 0
    name: str = field(default="select", init=False)
    kinds: tuple[str, ...] = field(default=("select",), init=False)
    candidates: int = field(default=4, init=False)
    regions: int = field(default=4, init=False)

    def __post_init__(self) -> None:
        if self.image_size % 16 or self.image_size < 64:
            raise InputError(f"task.image_size={self.image_size}: expected a multiple of 16, at least 64")
        if self.frames < 5 or self.frames % 4 != 1:
            raise InputError(f"task.frames={self.frames}: expected 4k + 1 frames, at least 5")
        if len(self.objects) != 2 or not FEWEST <= self.objects[0] <= self.objects[1] <= MOST:
            raise InputError(f"task.objects={list(self.objects)}: expected [fewest, most], from {FEWEST} to {MOST}")

    @property
    def targets(self) -> tuple[Target, ...]:
        return (
            Target("answer", 4, "candidate", "answer", self.kinds),
            Target("choice", 4, "candidate", "choice", self.kinds),
            Target("object", len(CELLS), "problem", "perception", self.kinds),  # cell of the named object
            Target("box", len(COLOURS), "problem", "perception", self.kinds),  # colour of the named box
            Target("corners", len(COLOURS), "region", "perception", self.kinds),  # colour of the box there
            Target("move", 4, "problem", "perception", self.kinds),  # first direction: up, down, left, right
            Target("objects", MOST - FEWEST + 1, "problem", "nuisance", self.kinds),
            Target("control", 4, "candidate", "control", self.kinds),
        )

    def problems(self, split: str, count: int, kind: str | None = None) -> list[Problem]:
        """The first `count` distinct problems of a split; there is one kind."""
        check_request(split, count, kind, self.kinds)
        entropy = draw_seed(self.seed, split, "select")
        return distinct((self._draw(entropy, index) for index in itertools.count()), split, count)

    def _draw(self, entropy: int, index: int) -> Problem:
        rng = np.random.default_rng([entropy, index])
        scene = draw_scene(int(rng.integers(self.objects[0], self.objects[1] + 1)), rng)
        key = canonical_key(scene)
        return _problem(scene, split_of(key), index, key, int(rng.integers(4)))

    def swapped(self, problem: Problem, *, object: int | None = None, box: int | None = None) -> Problem:
        """The same picture and wording with another object or box named: does the video follow the text?

        object: index into `problem.layout.objects`. box: corner of the box to name, which is the new answer.
        Raises ValueError for one that is not there. Name, split and control stay, so a sample keeps its noise; key
        and labels are the new problem's, and the key may belong to another split: measure only, never fit.
        """
        scene: Scene = problem.layout
        named = scene.named if object is None else object
        corner = scene.corner if box is None else box
        for name, value, end in (("object", named, len(scene.objects)), ("box", corner, len(CORNERS))):
            if not 0 <= value < end:
                raise InputError(f"{name}={value}: expected one of the problem's, 0 to {end - 1}")
        other = replace(scene, named=named, corner=corner)
        return _problem(other, problem.split, problem.index, canonical_key(other), problem.labels["control"])

    def image(self, problem: Problem) -> UInt8[np.ndarray, "height width 3"]:
        return PALETTE[_film(problem.layout, self.image_size, _way(problem.layout, self.frames)[:1])[0]]

    def video(self, problem: Problem) -> UInt8[np.ndarray, "frame height width 3"]:
        """The reference: the named object goes evenly along the longer distance (equal ones: sideways), then along
        the other into the box, drawn over whatever lies on its way, and rests there."""
        return PALETTE[_film(problem.layout, self.image_size, _way(problem.layout, self.frames))]

    def workspace(self, problem: Problem) -> Bool[np.ndarray, "height width"]:
        """Where any object would pass on its way to any box: the picture does not tell which are named."""
        mask = np.zeros((self.image_size, self.image_size), dtype=bool)
        for (cell, _), corner in itertools.product(problem.layout.objects, range(4)):
            for leg in itertools.pairwise(_bends(cell, corner)):
                mask[_cut(leg, OBJECT, self.image_size)] = True
        return mask

    def solutions(self, problem: Problem) -> tuple[int, ...]:
        return (problem.layout.corner,)

    def plausible_answers(self, problem: Problem) -> tuple[int, ...]:
        """All four corners: only the prompt tells them apart."""
        return tuple(range(self.candidates))

    def readout(self, problem: Problem, video: Float[np.ndarray, "frame height width 3"]) -> Readout:
        """Reads the last frame of a video with values in [0, 1]; `path` compares every frame with the reference.

        A box holds what its room is nearest to: nothing, or one of the 12 objects, which may sit one unit off.
        The answer is the box with the named object. None when no box has it or several have, when a box holds
        another object or something that is no object, or when the named object is (also) seen outside.
        Scores: how much nearer a room is to the named object than to emptiness, 1 for a perfect picture of it.
        """
        scene: Scene = problem.layout
        wanted = scene.objects[scene.named][1]
        pixels = ((np.arange(BOARD) + 0.5) * video.shape[1] / BOARD).astype(int)  # one for each unit
        seen = np.asarray(video, dtype=np.float32)[:, pixels[:, None], pixels]
        rooms = np.stack([seen[-1][_cut([corner], ROOM)] for corner in CORNERS])
        added, objects = (rooms - PAINT[LIGHT]).reshape(len(CORNERS), -1), _templates()
        energy = np.square(objects).sum(-1)  # [identity, shift]
        excess = energy - 2 * np.einsum("rp,isp->ris", added, objects)  # squared error less that of an empty room
        least, best = excess.min((1, 2)), excess.min(2).argmin(1)
        clear = least + np.square(added).sum(-1) < CLEAR * energy[best, 0]  # else nearest to an object, but not near
        found = (least < 0) & clear & (best == wanted)
        settled = found.sum() == 1 and (least[~found] >= 0).all() and not _outside(scene, seen[-1])
        scores = tuple(float(score) for score in (-excess / energy)[:, wanted].max(-1))
        return Readout(int(found.argmax()) if settled else None, scores, _agreement(scene, seen, self.frames))


@dataclass
class SelectConfig:
    """problems: how many, over all splits. seeds: noise seeds of each. The rest as in `Select`; checked at once."""

    problems: int = 600
    seeds: int = 1
    image_size: int = 64
    frames: int = 13
    objects: list[int] = field(default_factory=lambda: [FEWEST, MOST])
    seed: int = 0

    def __post_init__(self) -> None:
        check_counts(self)
        self.build()

    def build(self) -> Select:
        return Select(self.image_size, self.frames, tuple(self.objects), self.seed)


FAMILY = SelectConfig


def draw_scene(count: int, rng: np.random.Generator) -> Scene:
    """A scene with `count` objects. What is named is drawn last and used for nothing else, so the picture cannot
    tell it. Of several arrangements one with the fewest objects in line with each other is kept: whichever object
    moves then passes over others less often (measured: in 28 of 100 problems, not 41)."""
    arrangements = [divmod(rng.permutation(len(CELLS))[:count], 3) for _ in range(ARRANGEMENTS)]
    rows, columns = max(arrangements, key=lambda drawn: sum(len(set(lines)) for lines in drawn))
    identities = rng.permutation(len(COLOURS) * len(SHAPES))[:count]
    objects = sorted(zip((rows * 3 + columns).tolist(), identities.tolist(), strict=True))
    boxes = tuple(rng.permutation(len(COLOURS)).tolist())
    return Scene(boxes, tuple(objects), int(rng.integers(count)), int(rng.integers(4)), int(rng.integers(len(PHRASES))))


def canonical_key(scene: Scene) -> str:
    """Identity under the 8 symmetries of the square. Colours stay, the wording of the prompt does not count."""
    cells, boxes = np.full(len(CELLS), -1), np.array(scene.boxes)
    for cell, identity in scene.objects:
        cells[cell] = identity
    views = [(cells.reshape(3, 3), boxes.reshape(2, 2)), (cells.reshape(3, 3).T, boxes.reshape(2, 2).T)]
    seen = min([np.rot90(grid, turns).tolist() for grid in view] for view in views for turns in range(4))
    named = scene.objects[scene.named][1], scene.boxes[scene.corner]
    return hashlib.sha256(repr((named, seen)).encode()).hexdigest()[:16]


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
    """Start, turn and end of the way from a cell into a box: the longer distance first, sideways if they are equal."""
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
    """Pixels under a square `width` units wide whose centre goes from point to point."""
    edges = [edge for at in zip(*points, strict=True) for edge in (min(at) - width / 2, max(at) + width / 2)]
    top, bottom, left, right = (int(edge * size / BOARD + 0.5) for edge in edges)
    return slice(top, bottom), slice(left, right)


@lru_cache
def _shapes(height: int, width: int) -> Bool[np.ndarray, "shape height width"]:
    """The shapes in so many pixels: any two differ in a third of the pixels or more, none of them in detail."""
    y, x = np.ix_(*((np.arange(side) + 0.5) / side * 2 - 1 for side in (height, width)))
    return np.stack([y**2 + x**2 <= 1, np.abs(x) <= 0.4 + 0 * y, np.abs(y) <= 0.4 + 0 * x])


def _film(scene: Scene, size: int, way: list[tuple[int, int]]) -> UInt8[np.ndarray, "frame size size"]:
    """Index into PALETTE of every pixel, the named object standing at each centre of `way` in turn."""
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
    """What each object adds to the values of an empty room, in its middle and one unit off."""
    shapes, shifts = _shapes(OBJECT, OBJECT), itertools.product((0, 1, 2), repeat=2)
    masks = np.stack([np.pad(shapes, ((0, 0), (y, 2 - y), (x, 2 - x))) for y, x in shifts], axis=1)
    added = (PAINT[:LIGHT] - PAINT[LIGHT])[:, None, None, None, None] * masks[..., None]
    return added.reshape(len(COLOURS) * len(SHAPES), masks.shape[1], -1)


def _outside(scene: Scene, frame: Float[np.ndarray, "height width 3"]) -> bool:
    """Whether the named object is seen anywhere but in a box; cells of others of its colour are not looked at."""
    wanted = scene.objects[scene.named][1]
    hit = (np.square(PAINT).sum(1) - 2 * frame @ PAINT.T).argmin(-1) == wanted // 3  # nearest colour of the palette
    alike = [CELLS[cell] for cell, identity in scene.objects if identity != wanted and identity // 3 == wanted // 3]
    for centre, width in (*((corner, BOX) for corner in CORNERS), *((cell, OBJECT) for cell in alike)):
        hit[_cut([centre], width)] = False
    mask = _shapes(OBJECT, OBJECT)[wanted % 3].ravel()
    windows = np.lib.stride_tricks.sliding_window_view(hit.astype(np.float32), (OBJECT, OBJECT))
    return bool((windows.reshape(-1, mask.size) @ mask).max() > 0.6 * mask.sum())


def _agreement(scene: Scene, seen: Float[np.ndarray, "frame height width 3"], frames: int) -> float:
    """Overlap of what changed since the picture with what should have, over all frames, as intersection over union."""
    way = _way(scene, frames)
    at = np.rint(np.linspace(frames - 1, 0, len(seen))[::-1]).astype(int)  # of any length: last frames stay together
    film = _film(scene, BOARD, [way[0], *(way[frame] for frame in at)])
    change, miss = (np.einsum("fyxc,fyxc->fyx", off, off) for off in (seen - PAINT[film[0]], seen - PAINT[film[1:]]))
    wanted = film[1:] != film[0]
    return float((wanted & (miss < change)).sum() / max(1, (wanted | (change > 0.25)).sum()))
