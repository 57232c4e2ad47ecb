"""Boards with a row to complete: one more own piece makes k in a row, across, down or on a diagonal.

`one` problems have exactly one empty cell that completes a row; on `several` problems two or three do: any of them is
right, the model must commit. The other colour blocks some of our rows and has a row of its own to complete.

Crowds tell little because of how boards are drawn: the winning cell first, all cells alike, then its row, then the
other own pieces, rarer in line with that cell (`_weights`), so that on average it sees no more of them than another
empty cell. One given row is linear in the pixels, so a linear classifier of the default boards still learns some:
0.14 to 0.15 after 1,500 problems against 0.07 for guessing an empty cell.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float, UInt8

from cosprobe.errors import InputError
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

EMPTY, OWN, OTHER = range(3)  # what a cell holds
LIGHT, RED, BLUE, GOLD, GRID = range(5)  # colours; empty, own and other cells are the first three
PALETTE = np.array([[240, 240, 235], [214, 40, 40], [36, 84, 214], [250, 190, 20], [185, 185, 192]], dtype=np.uint8)
MARGIN = 2 / 64  # around the board, in parts of the image
DISC, CORE = 0.4, 0.25  # radius of a piece, and of what is read of it, in cells
REST = 2  # frames the finished row is shown
COUNT_BINS = 3  # of the number of pieces
BLOCK, TRIES, PASSES = 64, 48, 200  # problems drawn together, boards tried for each at a time, times before giving up
PICKY = 0.8  # share of problems that look for threats and near misses
THIN, RIM = 1.3, 1.5  # how much rarer own pieces are in line with the winning cell, how much denser at the rim
NUMBERS = {3: "three", 4: "four", 5: "five", 6: "six"}
PHRASES = (
    "{put} one red {piece} into the empty cell that makes {k} red {piece}s in a row and turn the row gold",
    "red moves next find the empty cell that completes {k} in a row {put} a red {piece} there and turn the row gold",
    "{k} red {piece}s in a row win {put} the missing {piece} across down or diagonally then turn the row gold",
    "complete a straight line of {k} red {piece}s with one new {piece} in an empty cell then let the line turn gold",
    "where does one more red {piece} make {k} in a row {put} it there and turn the whole line gold",
)
VERBS, NOUNS = ("put", "place", "add", "set"), ("piece", "disc", "stone")


@dataclass(frozen=True)
class Board:
    """What each cell holds. solutions: the finished row of every winning cell. cell: the one the reference fills."""

    marks: bytes
    solutions: dict[int, tuple[int, ...]]
    cell: int


@lru_cache
def geometry(n: int, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rows of k cells on n x n: cells [row, k]; direction [row], 0 across, 1 down, 2 down-right, 3 up-right; whether
    it holds a cell [cell, row]; and where each cell of the 8 turned and mirrored boards comes from [8, cell]."""
    cells = np.arange(n * n).reshape(n, n)
    rows, direction = [], []
    for d, (down, right) in enumerate(((0, 1), (1, 0), (1, 1), (-1, 1))):
        for r, c in np.ndindex(n, n):
            if 0 <= r + (k - 1) * down < n and c + (k - 1) * right < n:
                direction.append(d)
                rows.append([cells[r + i * down, c + i * right] for i in range(k)])
    holds = np.zeros((n * n, len(rows)), dtype=np.float32)
    holds[np.array(rows).T, np.arange(len(rows))] = 1
    turns = [f.ravel() for t in (cells, cells.T) for f in (t, t[::-1], t[:, ::-1], t[::-1, ::-1])]
    return np.array(rows), np.array(direction), holds, np.array(turns)


def canonical_key(n: int, k: int, marks: bytes) -> str:
    """Identity under the 8 symmetries of the square: the smallest of the turned and mirrored boards."""
    views = np.frombuffer(marks, dtype=np.uint8)[geometry(n, k)[3]]
    return hashlib.sha256(f"{n}/{k}/".encode() + min(view.tobytes() for view in views)).hexdigest()[:16]


@dataclass(frozen=True)
class Line:
    """size: cells a side. row: pieces in a row that win. pieces: fewest and most on the board, half of each colour.
    image_size: pixels a side, a multiple of 16 and at least 64. seed: another seed is another world."""

    image_size: int = 64
    frames: int = 13
    size: int = 6
    row: int = 4
    pieces: tuple[int, int] = (20, 26)
    seed: int = 0
    name: str = field(default="line", init=False)
    kinds: tuple[str, str] = field(default=("one", "several"), init=False)

    def __post_init__(self) -> None:
        least, most = 2 * self.row - 3, self.size**2 - 3
        checks = (
            (self.image_size % 16 == 0 and self.image_size >= 64, "image_size", "a multiple of 16, at least 64"),
            (self.frames >= 5, "frames", "at least 5 frames"),
            (3 <= self.size <= 6, "size", "3 to 6 cells a side"),
            (3 <= self.row <= self.size, "row", f"3 to task.size={self.size} in a row"),
            (least <= self.pieces[0] <= self.pieces[1] <= most, "pieces", f"fewest and most, from {least} to {most}"),
        )
        for good, name, expected in checks:
            if not good:
                raise InputError(f"task.{name}={getattr(self, name)}: expected {expected}")

    @property
    def regions(self) -> int:
        return self.size**2

    candidates = regions

    @property
    def targets(self) -> tuple[Target, ...]:
        both, cells = self.kinds, self.size**2
        return (
            Target("answer", cells, "candidate", "answer", ("one",)),
            Target("choice", cells, "candidate", "choice", ("several",)),
            Target("pieces", 3, "region", "perception", both),
            Target("centre", 9, "problem", "perception", both),
            Target("lines", 4, "problem", "perception", ("one",)),
            Target("threat", cells, "candidate", "perception", both),
            Target("count", COUNT_BINS, "problem", "nuisance", both),
            Target("control", cells, "candidate", "control", both),
        )

    def problems(self, split: str, count: int, kind: str | None = None) -> list[Problem]:
        """The first `count` distinct problems of a split; without `kind`, one and several winning cells by turns."""
        check_request(split, count, kind, self.kinds)
        if kind is not None:
            return distinct(self._draw(split, kind), split, count)
        return by_turns(self.kinds, count, lambda part, one: self.problems(split, part, one))

    def _draw(self, split: str, kind: str) -> Iterator[Problem]:
        entropy = draw_seed(self.seed, split, kind)
        block = 0
        while True:
            rng = np.random.default_rng([entropy, block])
            boards = self._boards(kind, rng)
            extras = rng.integers((1 << 30, self.size**2, len(PHRASES), len(VERBS), len(NOUNS)), size=(BLOCK, 5))
            for i, (board, extra) in enumerate(zip(boards, extras.tolist(), strict=True)):
                yield self._problem(board, kind, block * BLOCK + i, extra)
            block += 1

    def _boards(self, kind: str, rng: np.random.Generator) -> UInt8[np.ndarray, "board cell"]:
        """Boards of one kind. A winning cell is kept until a board is found for it, or cells that are easier to fit
        would win more often. Most take a board with a threat by the other colour and a blocked row of ours first; of
        equal ones with several winning cells, one where crowds do not give these away."""
        (least, most), even = ((1, 1), 0.0) if kind == "one" else ((2, 3), 0.9)
        cells, waiting = rng.integers(self.size**2, size=BLOCK), np.arange(BLOCK)
        boards = np.zeros((BLOCK, self.size**2), dtype=np.uint8)
        for _ in range(PASSES):
            marks = self._fill(cells[waiting], rng)
            won, threatened, blocked, over = self._judge(marks)
            ways = (won > 0).sum(-1)
            fits = ~over & (ways >= least) & (ways <= most) & (won.max(-1) == 1) & ((threatened > 0).sum(-1) <= 1)
            picky = rng.random((len(waiting), 1)) < PICKY
            rank = 1 + picky * (2 * threatened.any(-1) + (blocked > 0) + even * self._even(marks, won))
            best, found = (fits * rank).argmax(-1), fits.any(-1)
            boards[waiting[found]] = marks[found, best[found]]
            waiting = waiting[~found]
            if not len(waiting):
                return boards
        text = f"no board found with {least} to {most} cells that complete a row; expected fewer pieces or longer rows"
        raise InputError(f"task.pieces={self.pieces}: {text}")

    def _even(self, marks: np.ndarray, won: np.ndarray) -> np.ndarray:
        """Near 1 where winning cells see as many own pieces more than others in line as other empty cells do."""
        holds = geometry(self.size, self.row)[2]
        seen = ((marks == OWN).astype(np.float32) - (marks == OTHER)) @ (holds @ holds.T)
        wins, rest = ((seen * c).sum(-1) / np.maximum(1, c.sum(-1)) for c in (won > 0, (marks == EMPTY) & (won == 0)))
        return 1 / (1 + np.abs(wins - rest))

    def _fill(self, cells: np.ndarray, rng: np.random.Generator) -> UInt8[np.ndarray, "board attempt cell"]:
        """Random boards on which an own piece in cells[board] completes at least one row."""
        share, weights = _weights(self.size, self.row, self.pieces)
        row = (rng.random((len(cells), TRIES, 1)) > share[cells][:, None]).sum(-1)
        total = rng.integers(self.pieces[0], self.pieces[1] + 1, row.shape)
        own = np.maximum((total + rng.integers(2, size=row.shape)) // 2, self.row - 1)
        # the first alarms to ring, at rates `weights`, draw without replacement: first the row, last its gap
        alarm = rng.standard_exponential((*row.shape, self.size**2), dtype=np.float32) / weights[cells][:, None]
        alarm[geometry(self.size, self.row)[2].T[row] > 0] = -1
        np.put_along_axis(alarm, np.broadcast_to(cells[:, None, None], (*row.shape, 1)), np.inf, -1)
        mine = alarm <= np.take_along_axis(np.sort(alarm, -1), own[..., None] - 1, -1)
        lot = rng.random(alarm.shape, dtype=np.float32)
        lot[mine | np.isinf(alarm)] = 2
        last = np.take_along_axis(np.sort(lot, -1), (total - own)[..., None] - 1, -1)
        return np.where(mine, OWN, np.where(lot <= last, OTHER, EMPTY)).astype(np.uint8)

    def _judge(self, marks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """For boards [..., cell]: rows that an own piece would complete in each cell, the same for the other colour,
        own rows that one other piece blocks [...], and whether a row is complete already [...]."""
        holds, k = geometry(self.size, self.row)[2], self.row
        own, other = ((marks == mark).astype(np.float32) @ holds for mark in (OWN, OTHER))
        open_own, open_other = (own == k - 1) & (other == 0), (other == k - 1) & (own == 0)
        won, threatened = ((rows.astype(np.float32) @ holds.T) * (marks == EMPTY) for rows in (open_own, open_other))
        return won, threatened, ((own == k - 1) & (other == 1)).sum(-1), ((own == k) | (other == k)).any(-1)

    def _problem(self, marks: np.ndarray, kind: str, index: int, extra: list[int]) -> Problem:
        n, (fewest, most), (lot, control, phrase, verb, noun) = self.size, self.pieces, extra
        rows, direction, _, _ = geometry(n, self.row)
        won, threatened, blocked, _ = self._judge(marks)
        wins = np.flatnonzero(won).tolist()
        finished = [int(((marks[rows] == OWN) | (rows == cell)).all(-1).argmax()) for cell in wins]
        solutions = {cell: tuple(rows[row].tolist()) for cell, row in zip(wins, finished, strict=True)}
        board = Board(marks.tobytes(), solutions, wins[lot % len(wins)])
        total, upper, lower = int(np.count_nonzero(marks)), (n // 2 - 1) * (n + 1), n // 2 * (n + 1)
        labels: dict[str, int | tuple[int, ...]] = {
            "pieces": tuple(marks.tolist()),
            "centre": int(marks[upper]) * 3 + int(marks[lower]),  # two cells of the main diagonal
            "count": (total - fewest) * COUNT_BINS // (most - fewest + 1),
            "control": control,
        }
        labels |= {"threat": int(threatened.argmax())} if threatened.any() else {}
        answer = wins[0] if kind == "one" else None
        labels |= {} if answer is None else {"answer": answer, "lines": int(direction[finished[0]])}
        key, words = canonical_key(n, self.row, board.marks), {"put": VERBS[verb], "piece": NOUNS[noun]}
        return Problem(
            "line", kind, split_of(key), index, key, PHRASES[phrase].format(k=NUMBERS[self.row], **words), answer,
            labels, {"pieces": total, "wins": len(wins), "misses": int(blocked)}, _boxes(n), board,
        )  # fmt: skip

    def image(self, problem: Problem) -> UInt8[np.ndarray, "height width 3"]:
        cell, distance, grid = _raster(self.image_size, self.size)
        marks = np.frombuffer(problem.layout.marks + bytes([EMPTY]), dtype=np.uint8)[cell]
        return PALETTE[np.where((marks != EMPTY) & (distance < DISC), marks, np.where(grid, GRID, LIGHT))]

    def video(self, problem: Problem) -> UInt8[np.ndarray, "frame height width 3"]:
        """The reference: an own piece grows in a winning cell, then the pieces of its row turn gold one by one, each
        from its middle, all at an even pace; the finished row rests."""
        board: Board = problem.layout
        cell, distance, _ = _raster(self.image_size, self.size)
        time = np.minimum(1.0, np.arange(self.frames) / (self.frames - 1 - REST)) * (1 + self.row)
        video = np.repeat(self.image(problem)[None], self.frames, axis=0)
        parts = [(board.cell, RED, 0), *((c, GOLD, 1 + i) for i, c in enumerate(board.solutions[board.cell]))]
        for place, colour, start in parts:
            y, x = np.nonzero(cell == place)
            frame, pixel = np.nonzero(distance[y, x] < DISC * np.clip(time - start, 0, 1)[:, None])
            video[frame, y[pixel], x[pixel]] = PALETTE[colour]
        return video

    def workspace(self, problem: Problem) -> Bool[np.ndarray, "height width"]:
        """Where an own piece is or could be: every empty cell may be filled, every own piece may turn gold."""
        cell, distance, _ = _raster(self.image_size, self.size)
        free = np.frombuffer(problem.layout.marks + bytes([OTHER]), dtype=np.uint8) != OTHER
        return free[cell] & (distance < DISC)

    def readout(self, problem: Problem, video: Float[np.ndarray, "frame height width 3"]) -> Readout:
        """Reads the last frame of a video with values in [0, 1]: what most of the middle of each cell shows.

        The answer is the empty cell that got an own or a gold piece. None when none or several did, when the other
        colour moved, or when a piece has gone or changed sides. What turned gold counts for `path` alone.
        """
        cell, distance, _ = _raster(self.image_size, self.size)
        core, marks = distance < CORE, np.frombuffer(problem.layout.marks, dtype=np.uint8)
        pixels = np.asarray(video[-1], dtype=np.float32)[core] * 255.0
        apart = np.sqrt(np.square(pixels[:, None] - PALETTE.astype(np.float32)).sum(-1))
        closer = (apart[:, LIGHT] - np.minimum(apart[:, RED], apart[:, GOLD])) / 255.0
        shown = [apart.argmin(-1) == colour for colour in (RED, BLUE, GOLD)]
        red, blue, gold, score = (np.bincount(cell[core], v) / np.bincount(cell[core]) for v in (*shown, closer))
        mine = red + gold > 0.5
        filled = np.flatnonzero(mine & (marks == EMPTY))
        spoilt = np.flatnonzero(np.where(marks == OWN, ~mine, (blue > 0.5) != (marks == OTHER)))
        seen = (("piece", filled), ("gold", np.flatnonzero(gold > 0.5)), ("spoilt", spoilt))
        drawn = {(name, int(c)) for name, cells in seen for c in cells}
        wanted = [{("piece", c), *(("gold", p) for p in line)} for c, line in problem.layout.solutions.items()]
        path = max(len(drawn & right) / len(drawn | right) for right in wanted)
        scores = tuple(np.where(marks == EMPTY, score, score - 4).tolist())  # a score is between -2 and 2
        return Readout(int(filled[0]) if len(filled) == 1 and not len(spoilt) else None, scores, path)

    def solutions(self, problem: Problem) -> tuple[int, ...]:
        return tuple(problem.layout.solutions)

    def plausible_answers(self, problem: Problem) -> tuple[int, ...]:
        return tuple(cell for cell, mark in enumerate(problem.layout.marks) if mark == EMPTY)


@dataclass
class LineConfig:
    """problems: how many, over all splits. seeds: noise seeds of each. The rest as in `Line`; checked at once."""

    problems: int = 600
    seeds: int = 1
    image_size: int = 64
    frames: int = 13
    size: int = 6
    row: int = 4
    pieces: list[int] = field(default_factory=lambda: [20, 26])
    seed: int = 0

    def __post_init__(self) -> None:
        check_counts(self)
        self.build()

    def build(self) -> Line:
        if len(self.pieces) != 2:
            raise InputError(f"task.pieces={self.pieces}: expected [fewest, most]")
        return Line(self.image_size, self.frames, self.size, self.row, (self.pieces[0], self.pieces[1]), self.seed)


FAMILY = LineConfig


@lru_cache
def _weights(n: int, k: int, pieces: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """For every winning cell: shares of the rows through it, summed up [cell, row], and rates of other own pieces
    [cell, cell].

    Directions are equally likely, and so are the rows of one. Where the row covers a cell with chance c and own pieces
    fill a cell with chance d, they get (d - c) / (1 - c) off the row, and d in all. Near corners c > d: pieces are
    made denser at the rim of every board, and THIN goes a little too far elsewhere.
    """
    _, direction, holds, _ = geometry(n, k)
    rows_of = holds @ np.eye(4)[direction]  # [cell, direction]
    share = holds / np.maximum(rows_of[:, direction], 1) / (rows_of > 0).sum(-1, keepdims=True)
    covers = share @ holds.T * (1 - np.eye(n * n))
    density = sum(pieces) / 4 / (n * n - 1)
    rates = np.clip((density - THIN * covers) / (1 - covers), 0.02, None)
    rim = np.pad(np.ones((n - 2, n - 2)), 1, constant_values=RIM).ravel()
    return share.cumsum(-1)[:, :-1], (rates * rim).astype(np.float32)


@lru_cache
def _raster(pixels: int, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every pixel: its cell (n * n: none), its distance from the middle of the cell in cells, if on the grid."""
    place = ((np.arange(pixels) + 0.5) / pixels - MARGIN) * n / (1 - 2 * MARGIN)
    index = np.floor(place).astype(int)
    inside = (index >= 0) & (index < n)
    both = inside[:, None] & inside
    cell = np.where(both, index[:, None] * n + index, n * n)
    off = place - index - 0.5
    distance = np.where(both, np.hypot(off[:, None], off), np.inf)
    line = (0.5 - np.abs(off)) * (1 - 2 * MARGIN) / n < 0.6 / 64  # a pixel of 64 on both sides
    return cell, distance, both & (line[:, None] | line)


@lru_cache
def _boxes(n: int) -> tuple[Box, ...]:
    edges = [MARGIN + i * (1 - 2 * MARGIN) / n for i in range(n + 1)]
    return tuple((edges[c], edges[r], edges[c + 1], edges[r + 1]) for r in range(n) for c in range(n))
