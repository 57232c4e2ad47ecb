"""Working memory: objects pass behind a wall, change lanes out of sight and come out again.

Every object starts at the left end of a lane of its own and moves right. Behind the wall all of them change lanes
together, by the arrow on the wall: one lane up, straight on, or one lane down (from the outermost lane round to the
other side). A white bar marks one exit; the question is which object will come out there.

The arrow is gone from the second frame on: latent frame 0 holds the first frame alone, so what a later latent frame
knows of the direction is remembered, not seen. It costs a model little: a wall without its arrow looks alike in all
problems, the first frame is given at every step, the prompt says the way. Sizes are in 64ths of the image.
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
from cosprobe.tasks.task import Problem, Readout, Target, check_counts, check_request, distinct, draw_seed, split_of

SIDE = 64  # units a side
LANES, LANE, TILE, OBJECT, BAR = 4, 16, 8, 12, 4  # lanes; heights and widths in units
WIDEST = 4  # tiles of the widest wall
END = SIDE - BAR - OBJECT  # left edge of an object that has arrived
REST = 2  # frames the final picture is shown once more
UP, STRAIGHT, DOWN = range(3)  # lanes moved: shift - 1
PAINT = np.array([[222, 62, 40], [64, 196, 88], [52, 102, 214], [245, 200, 40]], dtype=np.uint8)  # red to yellow
SHAPES = 3  # square, cross, bar: told apart without detail, which small autoencoders lose
NONE = len(PAINT) * SHAPES  # the class of an empty lane; an object is colour * 3 + shape
GROUND, WALL, MARK = (np.array(c, dtype=np.uint8) for c in ((35, 35, 48), (176, 164, 148), (255, 255, 255)))
CLEAR = 0.4  # an object is read when less than this share of its own contrast is left unexplained

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
    """objects: identity in each lane at the start, `NONE` where there is none. wall: its width in tiles."""

    objects: tuple[int, ...]
    shift: int
    marked: int
    wall: int

    @property
    def inside(self) -> tuple[int, ...]:
        """Identity in each lane once the objects have changed lanes."""
        return tuple(self.objects[(lane - self.shift + 1) % LANES] for lane in range(LANES))

    @property
    def span(self) -> tuple[int, int]:
        """Where the wall starts and ends. It covers whole tiles, so three of them stand left of the centre."""
        first = (SIDE // TILE - self.wall) // 2 * TILE
        return first, first + self.wall * TILE

    @property
    def key(self) -> str:
        """Identity under reflection upside down, which makes up down."""
        reflected = (self.wall, self.objects[::-1], DOWN - self.shift, LANES - 1 - self.marked)
        both = (self.wall, self.objects, self.shift, self.marked), reflected
        return hashlib.sha256(repr(min(both)).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Hide:
    """The hiding task. objects, walls: how many objects, and how many tiles of 1/8 image the wall is wide; one value of
    each is drawn per problem (repeat a value to weight it). image_size: pixels a side, a multiple of 16, at least 64.
    frames: 4k + 1, as autoencoders of video want them. seed: another seed is another world."""

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
        if self.image_size % 16 or self.image_size < 64:
            raise InputError(f"task.image_size={self.image_size}: expected a multiple of 16, at least 64")
        if self.frames % 4 != 1 or self.frames < 5:
            raise InputError(f"task.frames={self.frames}: expected 4k + 1 frames, at least 5")
        for name, values in (("objects", self.objects), ("walls", self.walls)):
            if not values or min(values) < 2 or max(values) > 4:
                raise InputError(f"task.{name}={list(values)}: expected whole numbers from 2 to 4")

    @property
    def targets(self) -> tuple[Target, ...]:
        """Role `memory`: no frame shows `inside` in the regions, where it is asked, and `origin` takes the arrow."""
        return (
            Target("answer", NONE, "problem", "answer", self.kinds),
            Target("choice", NONE, "problem", "choice", self.kinds),
            Target("inside", NONE + 1, "region", "memory", self.kinds),
            Target("origin", LANES, "problem", "memory", self.kinds),
            Target("marked", LANES, "problem", "perception", self.kinds),
            Target("shift", 3, "problem", "perception", self.kinds),
            Target("first", NONE + 1, "region", "perception", self.kinds),
            Target("objects", LANES - 1, "problem", "nuisance", self.kinds),
            Target("control", NONE, "problem", "control", self.kinds),
        )

    def problems(self, split: str, count: int, kind: str | None = None) -> list[Problem]:
        """The first `count` distinct problems of a split; there is one kind."""
        check_request(split, count, kind, self.kinds)
        return distinct(self._draw(split), split, count)

    def _draw(self, split: str) -> Iterator[Problem]:
        entropy = draw_seed(self.seed, split, "hide")
        for index in count():
            rng = np.random.default_rng([entropy, index])
            lanes = rng.permutation(LANES)[: rng.choice(self.objects)]
            objects = np.full(LANES, NONE)
            objects[lanes] = rng.permutation(NONE)[: len(lanes)]
            # which object is asked for, and the way it goes, are drawn before the exit: every object is as likely
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
        return self._film(problem.layout, 1)[0]

    def video(self, problem: Problem) -> UInt8[np.ndarray, "frame height width 3"]:
        """The reference: all objects cross evenly, stop beside the right border and rest there."""
        return self._film(problem.layout, self.frames)

    def hidden_frames(self, problem: Problem) -> tuple[int, ...]:
        """Frames of the reference video (not latent frames) in which no pixel of any object can be seen."""
        return tuple(np.flatnonzero(_behind(_lefts(self.frames), problem.layout.wall)).tolist())

    def workspace(self, problem: Problem) -> Bool[np.ndarray, "height width"]:
        """The lanes on both sides of the wall as far as the bar, and the arrow."""
        mask = np.repeat(np.arange(self.image_size)[None] < self._px(SIDE - BAR), self.image_size, axis=0)
        wall = mask[:, slice(*map(self._px, problem.layout.span))]
        wall[:] = _arrow(problem.layout.shift, *wall.shape)
        return mask

    def solutions(self, problem: Problem) -> tuple[int, ...]:
        """The one object that comes out of the marked lane."""
        return (problem.layout.inside[problem.layout.marked],)

    def plausible_answers(self, problem: Problem) -> tuple[int, ...]:
        """The objects of the first frame."""
        return tuple(sorted(identity for identity in problem.layout.objects if identity != NONE))

    def readout(self, problem: Problem, video: Float[np.ndarray, "frame height width 3"]) -> Readout:
        """Reads the mean of the last two frames of a video with values in [0, 1].

        The answer is None when nothing clear stands at the marked exit, when the object there is one the first frame
        did not have, or stands at several exits. Scores are correlations, so a faint object counts like a bold one,
        less two for objects the first frame did not have: the forced choice is one that takes part. path: objects at
        the right exits, out of all that should be there or that stand at an end where they should not.
        """
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
        return Readout(here if once and present[here] else None, tuple(map(float, scores)), path)

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
    """problems: how many, over all splits. seeds: noise seeds of each. The rest as in `Hide`; checked at once."""

    problems: int = 600
    seeds: int = 1
    image_size: int = 64
    frames: int = 13
    objects: list[int] = field(default_factory=lambda: [2, 3, 4])
    walls: list[int] = field(default_factory=lambda: [2, 3, 4])
    seed: int = 0

    def __post_init__(self) -> None:
        check_counts(self)
        self.build()

    def build(self) -> Hide:
        return Hide(self.image_size, self.frames, tuple(self.objects), tuple(self.walls), self.seed)


FAMILY = HideConfig


@lru_cache(maxsize=64)
def _lefts(frames: int) -> np.ndarray:
    """Left edge of the objects in every frame, in units.

    They wait as many frames (at most two) as it takes for the widest wall to hide them during one whole latent frame
    (frames 1 to 4, 5 to 8, ...); none where no wait does that.
    """
    frame, last = np.arange(frames), frames - 1 - REST
    paths = [np.clip((frame - wait) * END / (last - wait), 0, END) for wait in range(3) if wait < last]
    whole = [path for path in paths if _behind(path, WIDEST)[1:].reshape(-1, 4).all(1).any()]
    return (whole or paths)[0]


def _behind(lefts: np.ndarray, wall: int) -> np.ndarray:
    x0, x1 = Scene((), STRAIGHT, 0, wall).span
    return (lefts >= x0) & (lefts + OBJECT <= x1)


@lru_cache(maxsize=64)
def _shape(shape: int, side: int) -> np.ndarray:
    """Mask of a shape that fills a square of `side` pixels."""
    x, y = np.abs((np.indices((side, side)) + 0.5) / side - 0.5)
    return (x < 1, (x < 1 / 6) | (y < 1 / 6), x < 1 / 4)[shape]


@lru_cache(maxsize=64)
def _arrow(shift: int, height: int, width: int) -> np.ndarray:
    """Mask of the arrow among the pixels of the wall: 14 units long, its head as wide, in the middle of the wall."""
    x = (np.arange(width) + 0.5 - width / 2) * SIDE / height
    y = ((np.arange(height) + 0.5 - height / 2) * SIDE / height)[:, None]
    along, across = (x, np.abs(y)) if shift == STRAIGHT else (y * (shift - 1), np.abs(x))
    head = (along >= 0) & (along + across < 7)
    return head | ((along < 0) & (along > -7) & (across < 3))


@lru_cache(maxsize=8)
def _patterns(size: int) -> tuple[np.ndarray, ...]:
    """The end of a lane with each object in it [12, values], the same as unit vectors, contrast to an empty lane."""
    task = Hide(image_size=size)
    rows = [task._film(Scene((i, i, i, i), STRAIGHT, 0, 2), 1)[0, : size // LANES] for i in range(NONE + 1)]
    ends = np.stack([row[:, : task._px(OBJECT)] / np.float32(255) for row in rows]).reshape(NONE + 1, -1)
    return ends[:NONE], _unit(ends[:NONE]), np.square(ends - ends[NONE]).mean(-1)


def _unit(flat: np.ndarray) -> np.ndarray:
    """The last axis (pixels with their three channels) without the mean of every channel, at length one."""
    pixels = flat.reshape(*flat.shape[:-1], -1, 3)
    centred = (pixels - pixels.mean(-2, keepdims=True)).reshape(flat.shape)
    return centred / (np.linalg.norm(centred, axis=-1, keepdims=True) + 1e-6)
