"""Mazes: rooms on a lattice, one start, four candidate exits at the corners.

`one_exit` problems have exactly one exit that can be reached; the branches to the others are cut somewhere
between the fork and the exit's own doorstep, and mazes are drawn so that walls near an exit tell little of whether
it is the answer (`lattice.draw_layout`). `choice` problems leave two or three exits reachable: any of them is right,
the model must commit.

Rooms lie on an 8 x 8 board of tiles, a room in the middle half of its tile, so one room is one token of the
mini model and any image size that is a multiple of 16 shows the same problem.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Float, UInt8

from cosprobe.errors import InputError
from cosprobe.tasks.lattice import Edge, Layout, canonical_key, doors_of, draw_layout
from cosprobe.tasks.task import (
    Box,
    Problem,
    Readout,
    Target,
    by_turns,
    check_counts,
    check_request,
    distinct,
    draw_seed,
    split_of,
)

BOARD = 8  # tiles a side
WALL, FLOOR, START, EXIT, TRAIL = range(5)
PALETTE = np.array([[35, 35, 48], [236, 236, 230], [46, 160, 67], [52, 102, 214], [222, 62, 40]], dtype=np.uint8)
PROMPT = "draw a red trail from the green start through the corridors to a blue exit that can be reached"
REST = 2  # frames the finished trail is shown
LENGTH_BINS = (5, 7)  # rooms walked: short < 5, 5 <= medium < 7, long >= 7


@dataclass(frozen=True)
class Maze:
    """The maze task.

    rooms: rooms per side, one value drawn per problem (repeat a value to weight it).
    length: smallest and largest number of rooms walked from start to exit.
    image_size: pixels a side, a multiple of 16 and at least 64. seed: another seed is another world.
    """

    image_size: int = 64
    frames: int = 13
    rooms: tuple[int, ...] = (4, 5)
    length: tuple[int, int] = (1, 64)
    seed: int = 0
    name: str = field(default="maze", init=False)
    kinds: tuple[str, str] = field(default=("one_exit", "choice"), init=False)
    candidates: int = field(default=4, init=False)
    regions: int = field(default=4, init=False)

    def __post_init__(self) -> None:
        if self.image_size % 16 or self.image_size < 64:
            raise InputError(f"task.image_size={self.image_size}: expected a multiple of 16, at least 64")
        if not self.rooms or any(not 4 <= n <= BOARD for n in self.rooms):
            raise InputError(f"task.rooms={list(self.rooms)}: expected rooms per side from 4 to {BOARD}")
        if not 1 <= self.length[0] <= self.length[1]:
            raise InputError(f"task.length={list(self.length)}: expected [shortest, longest] with 1 <= shortest")
        if self.frames < 2:
            raise InputError(f"task.frames={self.frames}: expected at least 2 frames")

    @property
    def targets(self) -> tuple[Target, ...]:
        both, side = self.kinds, max(self.rooms)
        return (
            Target("answer", 4, "candidate", "answer", ("one_exit",)),
            Target("choice", 4, "candidate", "choice", ("choice",)),
            Target("start", side * side, "problem", "perception", both),
            Target("corridors", 2, "region", "perception", both),
            Target("length", len(LENGTH_BINS) + 1, "problem", "nuisance", ("one_exit",)),
            Target("control", 4, "candidate", "control", both),
        )

    def problems(self, split: str, count: int, kind: str | None = None) -> list[Problem]:
        """The first `count` distinct problems of a split; without `kind`, one-exit and choice by turns."""
        check_request(split, count, kind, self.kinds)
        if kind is not None:
            return distinct(self._draw(split, kind), split, count)
        return by_turns(self.kinds, count, lambda part, one: self.problems(split, part, one))

    def _draw(self, split: str, kind: str) -> Iterator[Problem]:
        entropy = draw_seed(self.seed, split, kind)
        index = 0
        while True:
            rng = np.random.default_rng([entropy, index])
            layout = draw_layout(int(rng.choice(self.rooms)), kind, rng)
            index += 1
            walked = len(layout.solutions[layout.exit]) - 1
            if not self.length[0] <= walked <= self.length[1]:
                continue
            key = canonical_key(layout)
            owner = split_of(key)
            yield self._problem(layout, kind, owner, index - 1, key, int(rng.integers(4)))

    def _problem(self, layout: Layout, kind: str, split: str, index: int, key: str, control: int) -> Problem:
        n, offset = layout.rooms, (BOARD - layout.rooms) // 2
        walked = len(layout.solutions[layout.exit]) - 1
        doors = tuple(sum(corner in edge for edge in layout.passages) for corner in layout.corners)
        answer = layout.corners.index(layout.exit) if kind == "one_exit" else None
        row, column = divmod(layout.start, n)
        labels: dict[str, int | tuple[int, ...]] = {
            "start": row * max(self.rooms) + column,
            "corridors": tuple(min(d, 2) - 1 for d in doors),
            "length": int(np.digitize(walked, LENGTH_BINS)),
            "control": control,
        }
        if answer is not None:
            labels["answer"] = answer
        regions = tuple(_tile_box(offset + corner // n, offset + corner % n) for corner in layout.corners)
        return Problem(
            "maze", kind, split, index, key, PROMPT, answer, labels,
            {"rooms": n, "length": walked, "reachable": len(layout.solutions)}, regions, layout,
        )  # fmt: skip

    def image(self, problem: Problem) -> UInt8[np.ndarray, "height width 3"]:
        return PALETTE[self._board(problem.layout)]

    def video(self, problem: Problem) -> UInt8[np.ndarray, "frame height width 3"]:
        """The reference: the trail grows evenly from the start, fills the exit and rests there.

        The rest is for the autoencoder, which joins four frames in one latent: an exit filled in the very
        last frame alone is averaged away (4 % of reconstructions read as none, against 0 with the rest).
        """
        layout = problem.layout
        board = self._board(layout)
        cells = trail_cells(layout.solutions[layout.exit])
        video = np.empty((self.frames, *board.shape), dtype=np.intp)
        drawn = 0
        for frame in range(self.frames):
            until = round(min(1.0, frame / max(1, self.frames - 1 - REST)) * len(cells))
            for cell in cells[drawn:until]:
                board[self._pixels(layout, cell)] = TRAIL
            drawn = until
            video[frame] = board
        return PALETTE[video]

    def workspace(self, problem: Problem) -> Bool[np.ndarray, "height width"]:
        """Rooms and doorways that can be walked to from the start."""
        layout: Layout = problem.layout
        everything: set[int | Edge] = {*range(layout.rooms**2), *layout.passages}
        rooms = _flood(layout.start, set(layout.passages), everything)
        mask = np.zeros((self.image_size, self.image_size), dtype=bool)
        walkable: list[int | Edge] = [*rooms, *(edge for edge in layout.passages if edge[0] in rooms)]
        for cell in walkable:
            mask[self._pixels(layout, cell)] = True
        return mask

    def readout(self, problem: Problem, video: Float[np.ndarray, "frame height width 3"]) -> Readout:
        """Reads the last frame of a video with values in [0, 1].

        An exit is reached when trail-coloured cells connect it to the start (walls drawn over count as
        trail: what was drawn is read, not what was allowed). Reaching several exits reads as None.
        """
        layout: Layout = problem.layout
        frame = np.asarray(video[-1], dtype=np.float32) * 255.0
        distance = np.square(frame[:, :, None, :] - PALETTE.astype(np.float32)).sum(-1)
        is_trail = distance.argmin(-1) == TRAIL
        steps = doors_of(layout.rooms)
        drawn = {
            cell for cell in [*range(layout.rooms**2), *steps] if is_trail[self._pixels(layout, cell)].mean() > 0.5
        }
        reached = _flood(layout.start, {edge for edge in steps if edge in drawn}, drawn)
        exits = [k for k, corner in enumerate(layout.corners) if corner in reached]
        root = np.sqrt(distance)
        closer = (root[..., EXIT] - root[..., TRAIL]) / 255.0
        scores = tuple(float(closer[self._pixels(layout, corner)].mean()) for corner in layout.corners)
        path = max(_overlap(drawn, set(trail_cells(walk))) for walk in layout.solutions.values())
        return Readout(exits[0] if len(exits) == 1 else None, scores, path)

    def solutions(self, problem: Problem) -> tuple[int, ...]:
        """Candidates that count as right: one for one-exit problems, several for choice problems."""
        return tuple(k for k, corner in enumerate(problem.layout.corners) if corner in problem.layout.solutions)

    def plausible_answers(self, problem: Problem) -> tuple[int, ...]:
        """All four exits: which of them can be reached is the puzzle."""
        return tuple(range(self.candidates))

    def _board(self, layout: Layout) -> np.ndarray:
        board = np.full((self.image_size, self.image_size), WALL, dtype=np.intp)
        for room in range(layout.rooms**2):
            board[self._pixels(layout, room)] = FLOOR
        for edge in layout.passages:
            board[self._pixels(layout, edge)] = FLOOR
        for corner in layout.corners:
            board[self._pixels(layout, corner)] = EXIT
        board[self._pixels(layout, layout.start)] = START
        return board

    def _pixels(self, layout: Layout, cell: int | Edge) -> tuple[slice, slice]:
        """Pixels of a room (an int) or of the doorway between two neighbouring rooms (a pair)."""
        offset = (BOARD - layout.rooms) // 2
        a, b = cell if isinstance(cell, tuple) else (cell, cell)
        (ra, ca), (rb, cb) = divmod(a, layout.rooms), divmod(b, layout.rooms)

        def span(low: int, high: int) -> slice:  # quarter tiles; a doorway starts where its first room ends
            start, stop = (4 * low + 1, 4 * low + 3) if low == high else (4 * low + 3, 4 * high + 1)
            quarter = self.image_size / (4 * BOARD)
            return slice(int((start + 4 * offset) * quarter + 0.5), int((stop + 4 * offset) * quarter + 0.5))

        return span(ra, rb), span(ca, cb)


@dataclass
class MazeConfig:
    """problems: how many, over all splits. seeds: noise seeds of each. The rest as in `Maze`; checked at once."""

    problems: int = 600
    seeds: int = 1
    image_size: int = 64
    frames: int = 13
    rooms: list[int] = field(default_factory=lambda: [4, 5])
    length: list[int] = field(default_factory=lambda: [1, 64])
    seed: int = 0

    def __post_init__(self) -> None:
        check_counts(self)
        self.build()

    def build(self) -> Maze:
        if len(self.length) != 2:
            raise InputError(f"task.length={self.length}: expected [shortest, longest]")
        return Maze(self.image_size, self.frames, tuple(self.rooms), (self.length[0], self.length[1]), self.seed)


FAMILY = MazeConfig


def trail_cells(walk: tuple[int, ...]) -> list[int | Edge]:
    """The cells a trail covers after the start room, in order: doorway, room, doorway, ..., exit."""
    cells: list[int | Edge] = []
    for a, b in pairwise(walk):
        cells += [(min(a, b), max(a, b)), b]
    return cells


def _flood(start: int, edges: set[Edge], drawn: set[int | Edge]) -> set[int]:
    """Rooms joined to the start through drawn doorways and drawn rooms (the start itself stays green)."""
    reached, frontier = {start}, [start]
    while frontier:
        a = frontier.pop()
        for edge in edges:
            if a in edge:
                b = edge[0] if edge[1] == a else edge[1]
                if b in drawn and b not in reached:
                    reached.add(b)
                    frontier.append(b)
    return reached


def _overlap(drawn: set[int | Edge], wanted: set[int | Edge]) -> float:
    return len(drawn & wanted) / max(1, len(drawn | wanted))


def _tile_box(row: int, column: int) -> Box:
    return column / BOARD, row / BOARD, (column + 1) / BOARD, (row + 1) / BOARD
