"""The task `hide`, for working memory: objects pass behind a wall, change lanes there and come out again.

Every object starts at the left end of its own lane and moves right. Behind the wall all objects shift by the same
number of lanes, as the arrow on the wall shows: one lane up, none, or one lane down (the outermost lanes wrap around).
A white bar marks the exit of one lane. The answer is the object that comes out there.

Only the first frame shows the arrow. Latent frame 0 encodes the first frame alone, so the later latent frames do not
show the direction. The model still receives it at every step: the first frame and the prompt are inputs of every step.
Sizes are in units of 1/64 of the image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count

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

SIDE = 64  # side of the image in units
LANES, LANE, TILE, OBJECT, BAR = 4, 16, 8, 12, 4  # lanes; heights and widths in units
WIDEST = 4  # width of the widest wall, in tiles
END = SIDE - BAR - OBJECT  # left edge of an object at the end of its lane
REST = 2  # number of times the final frame is repeated
UP, STRAIGHT, DOWN = range(3)  # values of `shift`; objects move shift - 1 lanes down
PAINT = np.array([[222, 62, 40], [64, 196, 88], [52, 102, 214], [245, 200, 40]], dtype=np.uint8)  # red to yellow
SHAPES = 3  # square, cross, bar: they differ without fine detail, which small autoencoders lose
NONE = len(PAINT) * SHAPES  # the class of an empty lane; an object is colour * 3 + shape
GROUND, WALL, MARK = (np.array(c, dtype=np.uint8) for c in ((35, 35, 48), (176, 164, 148), (255, 255, 255)))
CLEAR = 0.4  # the largest squared error of an object that counts as seen, as a share of its contrast

THINGS = ("shapes", "objects", "figures", "things")
WAYS = (
    ("move up one lane", "shift one lane up", "climb one lane"),
    ("stay in their lane", "keep to their lane", "go straight on"),
    ("move down one lane", "shift one lane down", "drop one lane"),
)
PROMPTS = (
    "the {things} move right behind the wall and {way} while they are hidden",
    "all {things} slide right and pass behind the wall where they {way} before they come out",
    "watch the {things} go behind the wall {way} out of sight and come out on the right",
    "behind the wall the {things} {way} then every one of them leaves on the right",
    "while the wall hides them the {things} {way} and travel right until they reach the border",
)


@dataclass(frozen=True)
class Scene:
    """The description of a problem.

    objects: identity of the object in each lane at the start, `NONE` for an empty lane. shift: UP, STRAIGHT or DOWN.
    marked: lane of the white bar. wall: width of the wall in tiles.
    """

    objects: tuple[int, ...]
    shift: int
    marked: int
    wall: int

    @property
    def inside(self) -> tuple[int, ...]:
        """Identity of the object in each lane after the shift."""
        return tuple(self.objects[(lane - self.shift + 1) % LANES] for lane in range(LANES))

    @property
    def span(self) -> tuple[int, int]:
        """Left and right edge of the wall in units. It covers whole tiles; one of three tiles is left of the centre."""
        first = (SIDE // TILE - self.wall) // 2 * TILE
        return first, first + self.wall * TILE

    @property
    def key(self) -> str:
        """A hash that is the same for a scene and its reflection top to bottom, which exchanges UP and DOWN."""
        reflected = (self.wall, self.objects[::-1], DOWN - self.shift, LANES - 1 - self.marked)
        both = (self.wall, self.objects, self.shift, self.marked), reflected
        return hashlib.sha256(repr(min(both)).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Hide:
    """The task `hide`. Fields as in `HideConfig`. Raises InputError for an invalid value."""

    image_size: int = 64
    frames: int = 13
    objects: tuple[int, ...] = (2, 3, 4)
    walls: tuple[int, ...] = (2, 3, 4)
    seed: int = 0
    name: str = field(default="hide", init=False)
    kinds: tuple[str, ...] = field(default=("hide",), init=False)
    candidates: int = field(default=NONE, init=False)
    regions: int = field(default=LANES, init=False)

    def __post_init__(self) -> None:
        check_video_size(self, 5, chunks=True)
        for name, values in (("objects", self.objects), ("walls", self.walls)):
            if not values or min(values) < 2 or max(values) > 4:
                raise InputError(f"task.{name}={list(values)}: expected whole numbers from 2 to 4")

    @property
    def targets(self) -> tuple[Target, ...]:
        """The labels that probes decode. `inside` and `origin` have the role `memory`.

        No frame shows `inside` in the regions, which are behind the wall. `origin`, the lane in which the answer
        starts, depends on the arrow.
        """
        return (
            Target("answer", NONE, "problem", Role.ANSWER, self.kinds),
            Target("model_answer", NONE, "problem", Role.MODEL_ANSWER, self.kinds),
            Target("inside", NONE + 1, "region", Role.MEMORY, self.kinds),
            Target("origin", LANES, "problem", Role.MEMORY, self.kinds),
            Target("marked", LANES, "problem", Role.PERCEPTION, self.kinds),
            Target("shift", 3, "problem", Role.PERCEPTION, self.kinds),
            Target("first", NONE + 1, "region", Role.PERCEPTION, self.kinds),
            Target("objects", LANES - 1, "problem", Role.NUISANCE, self.kinds),
            Target("control", NONE, "problem", Role.CONTROL, self.kinds),
        )

    def problems(self, split: str, count: int, kind: str | None = None) -> list[Problem]:
        """The first `count` distinct problems of a split. There is one kind."""
        check_request(split, count, kind, self.kinds)
        return distinct(self._draw(split), split, count)

    def _draw(self, split: str) -> Iterator[Problem]:
        entropy = draw_seed(self.seed, split, "hide")
        for index in count():
            rng = np.random.default_rng([entropy, index])
            lanes = rng.permutation(LANES)[: rng.choice(self.objects)]
            objects = np.full(LANES, NONE)
            objects[lanes] = rng.permutation(NONE)[: len(lanes)]
            # object and shift are drawn before the exit, so every object is equally likely to be the answer
            shift = int(rng.integers(3))
            marked = int(lanes[0] + shift - 1) % LANES
            scene = Scene(tuple(map(int, objects)), shift, marked, int(rng.choice(self.walls)))
            yield self._problem(scene, index, rng)

    def _problem(self, scene: Scene, index: int, rng: np.random.Generator) -> Problem:
        things, way, text = (str(rng.choice(words)) for words in (THINGS, WAYS[scene.shift], PROMPTS))
        answer, many, (x0, x1) = scene.inside[scene.marked], LANES - scene.objects.count(NONE), scene.span
        labels: dict[str, int | tuple[int, ...]] = {
            "answer": answer, "inside": scene.inside, "origin": scene.objects.index(answer), "marked": scene.marked,
            "shift": scene.shift, "first": scene.objects, "objects": many - 2, "control": int(rng.integers(NONE)),
        }  # fmt: skip
        regions = tuple((x0 / SIDE, n / LANES, x1 / SIDE, (n + 1) / LANES) for n in range(LANES))
        difficulty = {"objects": many, "hidden": int(_behind(_lefts(self.frames), scene.wall).sum())}
        key, text = scene.key, text.format(things=things, way=way)
        return Problem("hide", "hide", split_of(key), index, key, text, answer, labels, difficulty, regions, scene)

    def image(self, problem: Problem) -> UInt8[np.ndarray, "height width 3"]:
        """The first frame: objects at the left, wall with arrow, white bar at the right."""
        return self._film(problem.layout, 1)[0]

    def video(self, problem: Problem) -> UInt8[np.ndarray, "frame height width 3"]:
        """The reference video: all objects move right at constant speed and stop next to the right border."""
        return self._film(problem.layout, self.frames)

    def hidden_frames(self, problem: Problem) -> tuple[int, ...]:
        """Frames of the reference video (not latent frames) in which no pixel of any object can be seen."""
        return tuple(np.flatnonzero(_behind(_lefts(self.frames), problem.layout.wall)).tolist())

    def workspace(self, problem: Problem) -> Bool[np.ndarray, "height width"]:
        """Mask of the pixels that a solution may change: the lanes up to the bar, outside the wall, and the arrow."""
        mask = np.repeat(np.arange(self.image_size)[None] < self._px(SIDE - BAR), self.image_size, axis=0)
        wall = mask[:, slice(*map(self._px, problem.layout.span))]
        wall[:] = _arrow(problem.layout.shift, *wall.shape)
        return mask

    def solutions(self, problem: Problem) -> tuple[int, ...]:
        """The object that comes out of the marked lane."""
        return (problem.layout.inside[problem.layout.marked],)

    def plausible_answers(self, problem: Problem) -> tuple[int, ...]:
        """The objects of the first frame."""
        return tuple(sorted(identity for identity in problem.layout.objects if identity != NONE))

    def parse(self, problem: Problem, video: Float[np.ndarray, "frame height width 3"]) -> ParsedAnswer:
        """Reads the mean of the last two frames of a video with values in [0, 1].

        The answer is None when no object is clearly seen at the marked exit, when the first frame does not contain the
        object seen there, or when the same object is seen at several exits.
        Scores are correlations with the 12 objects, so contrast does not matter. They are lowered by 2 for objects that
        the first frame does not contain, so the forced choice is always an object of the first frame.
        path: intersection over union of the objects seen at the ends of the lanes and the objects that should be there.
        """
        check_video(video)
        scene: Scene = problem.layout
        picture = np.asarray(video[-REST:], dtype=np.float32).mean(0)
        patterns, units, contrast = _patterns(self.image_size)
        zones = np.stack([picture[:, self._px(x) : self._px(x + OBJECT)] for x in (0, END)]).reshape(2, LANES, -1)
        likeness = _unit(zones) @ units.T
        nearest = likeness.argmax(-1)
        clear = np.square(zones - patterns[nearest]).mean(-1) < CLEAR * contrast[nearest]
        seen = {(end, lane, int(nearest[end, lane])) for end, lane in np.argwhere(clear).tolist()}
        wanted = {(1, lane, identity) for lane, identity in enumerate(scene.inside) if identity != NONE}
        here = int(nearest[1, scene.marked])
        present = np.isin(np.arange(NONE), scene.objects)
        once = {lane for end, lane, identity in seen if (end, identity) == (1, here)} == {scene.marked}
        scores = likeness[1, scene.marked] - np.where(present, 0.0, 2.0)
        path = len(seen & wanted) / len(seen | wanted)
        return ParsedAnswer(here if once and present[here] else None, tuple(map(float, scores)), path)

    def _px(self, units: float) -> int:
        return int(units * self.image_size / SIDE + 0.5)

    def _film(self, scene: Scene, frames: int) -> UInt8[np.ndarray, "frame height width 3"]:
        size = self.image_size
        stage = np.full((size, size, 3), GROUND, dtype=np.uint8)
        stage[self._px(scene.marked * LANE) : self._px((scene.marked + 1) * LANE), self._px(SIDE - BAR) :] = MARK
        film = np.repeat(stage[None], frames, axis=0)
        side, (x0, x1) = self._px(OBJECT), scene.span
        for left, frame in zip(_lefts(self.frames)[:frames].tolist(), film, strict=True):
            x = self._px(left)
            lanes = scene.objects if left + OBJECT / 2 < (x0 + x1) / 2 else scene.inside
            for lane, identity in enumerate(lanes):
                if identity != NONE:
                    y = self._px(lane * LANE + (LANE - OBJECT) / 2)
                    frame[y : y + side, x : x + side][_shape(identity % SHAPES, side)] = PAINT[identity // SHAPES]
        wall = film[:, :, self._px(x0) : self._px(x1)]
        wall[:] = WALL
        wall[0][_arrow(scene.shift, size, wall.shape[2])] = GROUND
        return film


@dataclass
class HideConfig:
    """Settings of `Hide`. Raises InputError for an invalid value."""

    problems: int = 600
    "Number of problems, over all splits."
    seeds: int = 1
    "Number of noise seeds of each problem."
    image_size: int = 64
    "Side of the image in pixels, a multiple of 16 and at least 64."
    frames: int = 13
    "Number of video frames, 4k + 1 and at least 5."
    objects: list[int] = field(default_factory=lambda: [2, 3, 4])
    "Numbers of objects, from 2 to 4; one value is drawn per problem, so a repeated value is more frequent."
    walls: list[int] = field(default_factory=lambda: [2, 3, 4])
    "Widths of the wall, from 2 to 4 tiles of 1/8 of the image, drawn as `objects`."
    seed: int = 0
    "Random seed of the problems."

    def __post_init__(self) -> None:
        check_counts(self)
        self.build()

    def build(self) -> Hide:
        """The task with these settings."""
        return Hide(self.image_size, self.frames, tuple(self.objects), tuple(self.walls), self.seed)


FAMILY = HideConfig


@lru_cache(maxsize=64)
def _lefts(frames: int) -> np.ndarray:
    """Left edge of the objects in every frame, in units.

    The objects start to move after 0, 1 or 2 frames: the smallest number for which the widest wall hides them during a
    whole latent frame (video frames 1 to 4, 5 to 8, ...), or 0 when there is no such number.
    """
    frame, last = np.arange(frames), frames - 1 - REST
    paths = [np.clip((frame - wait) * END / (last - wait), 0, END) for wait in range(3) if wait < last]
    whole = [path for path in paths if _behind(path, WIDEST)[1:].reshape(-1, 4).all(1).any()]
    return (whole or paths)[0]


def _behind(lefts: np.ndarray, wall: int) -> np.ndarray:
    """Whether objects with these left edges are hidden completely by a wall of this width."""
    x0, x1 = Scene((), STRAIGHT, 0, wall).span
    return (lefts >= x0) & (lefts + OBJECT <= x1)


@lru_cache(maxsize=64)
def _shape(shape: int, side: int) -> np.ndarray:
    """Mask of a shape in a square of `side` pixels."""
    x, y = np.abs((np.indices((side, side)) + 0.5) / side - 0.5)
    return (x < 1, (x < 1 / 6) | (y < 1 / 6), x < 1 / 4)[shape]


@lru_cache(maxsize=64)
def _arrow(shift: int, height: int, width: int) -> np.ndarray:
    """Mask of the arrow in the pixels of the wall: centred, 14 units long, with a head 14 units wide."""
    x = (np.arange(width) + 0.5 - width / 2) * SIDE / height
    y = ((np.arange(height) + 0.5 - height / 2) * SIDE / height)[:, None]
    along, across = (x, np.abs(y)) if shift == STRAIGHT else (y * (shift - 1), np.abs(x))
    head = (along >= 0) & (along + across < 7)
    return head | ((along < 0) & (along > -7) & (across < 3))


@lru_cache(maxsize=8)
def _patterns(size: int) -> tuple[np.ndarray, ...]:
    """Templates for the parser, one per object: pixels of a lane's end with the object in it [12, value], the same
    centred and normalised (`_unit`) [12, value], and the mean squared difference from an empty lane's end [12]."""
    task = Hide(image_size=size)
    rows = [task._film(Scene((i, i, i, i), STRAIGHT, 0, 2), 1)[0, : size // LANES] for i in range(NONE + 1)]
    ends = np.stack([row[:, : task._px(OBJECT)] / np.float32(255) for row in rows]).reshape(NONE + 1, -1)
    return ends[:NONE], _unit(ends[:NONE]), np.square(ends - ends[NONE]).mean(-1)


def _unit(flat: np.ndarray) -> np.ndarray:
    """The last axis (pixel * channel) after subtraction of the mean of each channel, scaled to unit length."""
    pixels = flat.reshape(*flat.shape[:-1], -1, 3)
    centred = (pixels - pixels.mean(-2, keepdims=True)).reshape(flat.shape)
    return centred / (np.linalg.norm(centred, axis=-1, keepdims=True) + 1e-6)
