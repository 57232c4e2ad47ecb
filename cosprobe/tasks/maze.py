"""The task `maze`: rooms on a lattice, one start, four exits in the corners.

`one_exit` problems have exactly one reachable exit. The branches to the other exits are cut between the fork and the
last door. Mazes are drawn so that walls near an exit predict little of whether it is the answer
(`lattice.draw_layout`). `choice` problems have two or three reachable exits: each is a right answer, and the video has
to choose one.

The image is an 8 x 8 board of tiles. A room is the middle half of a tile. One room is therefore one token of the mini
model, and every image size that is a multiple of 16 shows the same problem.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Float, UInt8

from cosprobe.errors import InputError
from cosprobe.tasks.lattice import Edge, Layout, canonical_key, doors_of, draw_layout
from cosprobe.tasks.regions import Box
from cosprobe.tasks.splits import split_of
from cosprobe.tasks.task import (
    ParsedAnswer,
    Problem,
    Role,
    Target,
    by_turns,
    check_counts,
    check_request,
    check_video,
    check_video_size,
    distinct,
    draw_seed,
)

BOARD = 8  # tiles per side
WALL, FLOOR, START, EXIT, TRAIL = range(5)
PALETTE = np.array([[35, 35, 48], [236, 236, 230], [46, 160, 67], [52, 102, 214], [222, 62, 40]], dtype=np.uint8)
PROMPT = "draw a red trail from the green start through the corridors to a blue exit that can be reached"
REST = 2  # number of times the final frame is repeated
LENGTH_BINS = (5, 7)  # steps from room to room: short < 5, 5 <= medium < 7, long >= 7


@dataclass(frozen=True)
class Maze:
    """The task `maze`. Fields as in `MazeConfig`. Raises InputError for an invalid value."""

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
        check_video_size(self, 2)
        if not self.rooms or any(not 4 <= n <= BOARD for n in self.rooms):
            raise InputError(f"task.rooms={list(self.rooms)}: expected rooms per side from 4 to {BOARD}")
        most = max(self.rooms) ** 2 - 1  # steps of a walk through all rooms
        if not 1 <= self.length[0] <= min(self.length[1], most):
            raise InputError(
                f"task.length={list(self.length)}: expected [shortest, longest] with shortest from 1 to {most}"
            )

    @property
    def targets(self) -> tuple[Target, ...]:
        """The labels that probes decode."""
        both, side = self.kinds, max(self.rooms)
        return (
            Target("answer", 4, "candidate", Role.ANSWER, ("one_exit",)),
            Target("model_answer", 4, "candidate", Role.MODEL_ANSWER, ("choice",)),
            Target("start", side * side, "problem", Role.PERCEPTION, both),
            Target("corridors", 2, "region", Role.PERCEPTION, both),
            Target("length", len(LENGTH_BINS) + 1, "problem", Role.NUISANCE, ("one_exit",)),
            Target("control", 4, "candidate", Role.CONTROL, both),
        )

    def problems(self, split: str, count: int, kind: str | None = None) -> list[Problem]:
        """The first `count` distinct problems of a split. Without `kind`, `one_exit` and `choice` alternate."""
        check_request(split, count, kind, self.kinds)
        if kind is not None:
            return distinct(self._draw(split, kind), split, count)
        return by_turns(self.kinds, count, lambda part, one: self.problems(split, part, one))

    def _draw(self, split: str, kind: str) -> Iterator[Problem | None]:
        entropy = draw_seed(self.seed, split, kind)
        index = 0
        while True:
            rng = np.random.default_rng([entropy, index])
            layout = draw_layout(int(rng.choice(self.rooms)), kind, rng)
            index += 1
            walked = len(layout.solutions[layout.exit]) - 1
            if not self.length[0] <= walked <= self.length[1]:
                yield None
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
        """The first frame: the maze with a green start and four blue exits."""
        return PALETTE[self._board(problem.layout)]

    def video(self, problem: Problem) -> UInt8[np.ndarray, "frame height width 3"]:
        """The reference video: a red trail grows at constant speed from the start until it fills the exit.

        The final frame is repeated REST times, because the autoencoder encodes four frames into one latent frame. If
        only the last frame showed the filled exit, 4 % of the reconstructed videos would show no answer (0 % now).
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
        """Mask of the pixels that a solution may change: rooms and doorways that can be reached from the start."""
        layout: Layout = problem.layout
        everything: set[int | Edge] = {*range(layout.rooms**2), *layout.passages}
        rooms = _flood(layout.start, set(layout.passages), everything)
        mask = np.zeros((self.image_size, self.image_size), dtype=bool)
        walkable: list[int | Edge] = [*rooms, *(edge for edge in layout.passages if edge[0] in rooms)]
        for cell in walkable:
            mask[self._pixels(layout, cell)] = True
        return mask

    def parse(self, problem: Problem, video: Float[np.ndarray, "frame height width 3"]) -> ParsedAnswer:
        """Reads the last frame of a video with values in [0, 1].

        The answer is the exit that cells in the colour of the trail connect to the start. Trail across a wall counts
        too. The answer is None when no exit or several exits are connected.
        """
        check_video(video)
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
        return ParsedAnswer(exits[0] if len(exits) == 1 else None, scores, path)

    def solutions(self, problem: Problem) -> tuple[int, ...]:
        """The reachable exits: one for `one_exit` problems, two or three for `choice` problems."""
        return tuple(k for k, corner in enumerate(problem.layout.corners) if corner in problem.layout.solutions)

    def plausible_answers(self, problem: Problem) -> tuple[int, ...]:
        """All four exits. Which of them can be reached is the puzzle."""
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

        def span(low: int, high: int) -> slice:  # in quarters of a tile; a doorway starts at the end of its first room
            start, stop = (4 * low + 1, 4 * low + 3) if low == high else (4 * low + 3, 4 * high + 1)
            quarter = self.image_size / (4 * BOARD)
            return slice(int((start + 4 * offset) * quarter + 0.5), int((stop + 4 * offset) * quarter + 0.5))

        return span(ra, rb), span(ca, cb)


@dataclass
class MazeConfig:
    """Settings of `Maze`. Raises InputError for an invalid value."""

    problems: int = 600
    "Number of problems, over all splits."
    seeds: int = 1
    "Number of noise seeds of each problem."
    image_size: int = 64
    "Side of the image in pixels, a multiple of 16 and at least 64."
    frames: int = 13
    "Number of video frames, at least 2."
    rooms: list[int] = field(default_factory=lambda: [4, 5])
    "Rooms per side, from 4 to 8; one value is drawn per problem, so a repeated value is more frequent."
    length: list[int] = field(default_factory=lambda: [1, 64])
    "Smallest and largest number of steps from room to room between start and exit."
    seed: int = 0
    "Random seed of the problems."

    def __post_init__(self) -> None:
        check_counts(self)
        self.build()

    def build(self) -> Maze:
        """The task with these settings."""
        if len(self.length) != 2:
            raise InputError(f"task.length={self.length}: expected [shortest, longest]")
        return Maze(self.image_size, self.frames, tuple(self.rooms), (self.length[0], self.length[1]), self.seed)


FAMILY = MazeConfig


def trail_cells(walk: tuple[int, ...]) -> list[int | Edge]:
    """The cells that the trail covers after the start, in order: doorway, room, doorway, ..., exit."""
    cells: list[int | Edge] = []
    for a, b in pairwise(walk):
        cells += [(min(a, b), max(a, b)), b]
    return cells


def _flood(start: int, edges: set[Edge], drawn: set[int | Edge]) -> set[int]:
    """Rooms connected to the start through `drawn` doorways and rooms. The start itself need not be drawn."""
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
