"""The task `line`: boards on which one more red piece makes k in a row, across, down or on a diagonal.

Red pieces are called own pieces, blue ones the other pieces. A winning cell is an empty cell that completes a row.
`one` problems have exactly one winning cell. `several` problems have two or three: each is a right answer, and the
video has to choose one. On many boards the other colour blocks an own row or could complete a row itself (a threat).

The density of own pieces should not predict the winning cell. The winning cell is therefore drawn first, with equal
probability for all cells, then its row, then the other own pieces, at a lower rate in line with that cell (`_weights`).
On average it then has no more own pieces in line with it than other empty cells have. A linear classifier of the pixels
can still learn some rows: after 1,500 problems with the default settings its accuracy is 0.14 to 0.15, against 0.07 for
a random empty cell.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float, UInt8

from cosprobe.errors import InputError
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

EMPTY, OWN, OTHER = range(3)  # what a cell holds
LIGHT, RED, BLUE, GOLD, GRID = range(5)  # colours; empty, own and other cells are the first three
PALETTE = np.array([[240, 240, 235], [214, 40, 40], [36, 84, 214], [250, 190, 20], [185, 185, 192]], dtype=np.uint8)
MARGIN = 2 / 64  # around the board, as a fraction of the image
DISC, CORE = 0.4, 0.25  # radius of a piece, and of the part of a cell that is parsed, in cells
REST = 2  # number of times the final frame is repeated
COUNT_BINS = 3  # classes of the target `count`, the number of pieces
BLOCK, TRIES, PASSES = 64, 48, 200  # problems drawn together; boards drawn for each in one pass; most passes
PICKY = 0.8  # probability, per pass, of preferring boards with threats and blocked rows
THIN, RIM = 1.3, 1.5  # factors of the rates of own pieces, see `_weights`
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
    """The description of a problem.

    marks: EMPTY, OWN or OTHER for each cell. solutions: for every winning cell, the cells of the row it completes.
    cell: the winning cell that the reference video fills.
    """

    marks: bytes
    solutions: dict[int, tuple[int, ...]]
    cell: int


@lru_cache
def geometry(n: int, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """All rows of k cells on a board of n x n cells.

    Returns the cells of each row [row, k]; its direction [row] (0 across, 1 down, 2 down-right, 3 up-right); whether it
    contains a cell [cell, row], 0 or 1; and, for the 8 rotations and reflections of the board, the cell that each cell
    comes from [8, cell].
    """
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
    """A hash that is the same for a board and its images under the 8 symmetries of the square."""
    views = np.frombuffer(marks, dtype=np.uint8)[geometry(n, k)[3]]
    return hashlib.sha256(f"{n}/{k}/".encode() + min(view.tobytes() for view in views)).hexdigest()[:16]


@dataclass(frozen=True)
class Line:
    """The task `line`. Fields as in `LineConfig`. Raises InputError for an invalid value."""

    image_size: int = 64
    frames: int = 13
    size: int = 6
    row: int = 4
    pieces: tuple[int, int] = (20, 26)
    seed: int = 0
    name: str = field(default="line", init=False)
    kinds: tuple[str, str] = field(default=("one", "several"), init=False)

    def __post_init__(self) -> None:
        check_video_size(self, 5)
        least, most = 2 * self.row - 3, self.size**2 - 3
        checks = (
            (3 <= self.size <= 6, "size", "3 to 6 cells a side"),
            (3 <= self.row <= self.size, "row", f"3 to task.size={self.size} in a row"),
            (least <= self.pieces[0] <= self.pieces[1] <= most, "pieces", f"[fewest, most], from {least} to {most}"),
        )
        for good, name, expected in checks:
            if not good:
                raise InputError(f"task.{name}={getattr(self, name)}: expected {expected}")

    @property
    def regions(self) -> int:
        """Number of cells of the board: each is a region and a candidate."""
        return self.size**2

    candidates = regions

    @property
    def targets(self) -> tuple[Target, ...]:
        """The labels that probes decode."""
        both, cells = self.kinds, self.size**2
        return (
            Target("answer", cells, "candidate", Role.ANSWER, ("one",)),
            Target("model_answer", cells, "candidate", Role.MODEL_ANSWER, ("several",)),
            Target("pieces", 3, "region", Role.PERCEPTION, both),
            Target("centre", 9, "problem", Role.PERCEPTION, both),
            Target("lines", 4, "problem", Role.PERCEPTION, ("one",)),
            Target("threat", cells, "candidate", Role.PERCEPTION, both),
            Target("count", COUNT_BINS, "problem", Role.NUISANCE, both),
            Target("control", cells, "candidate", Role.CONTROL, both),
        )

    def problems(self, split: str, count: int, kind: str | None = None) -> list[Problem]:
        """The first `count` distinct problems of a split. Without `kind`, the kinds `one` and `several` alternate."""
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
        """BLOCK boards of one kind.

        The winning cells are drawn first. Boards are drawn for each cell until one fits: without this, cells for which
        boards fit more often would win more often. In a share PICKY of the passes the board is chosen by preference:
        first one with a threat, then one with a blocked own row, then (kind `several`) one with a high `_even`.
        Raises InputError when no board is found in PASSES passes.
        """
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
        text = f"found no board with {least} to {most} winning cells; expected fewer pieces or a larger task.row"
        raise InputError(f"task.pieces={self.pieces}: {text}")

    def _even(self, marks: np.ndarray, won: np.ndarray) -> np.ndarray:
        """Balance of each board, 1 = balanced: winning cells have the same surplus of own over other pieces in line
        with them as the other empty cells have."""
        holds = geometry(self.size, self.row)[2]
        seen = ((marks == OWN).astype(np.float32) - (marks == OTHER)) @ (holds @ holds.T)
        wins, rest = ((seen * c).sum(-1) / np.maximum(1, c.sum(-1)) for c in (won > 0, (marks == EMPTY) & (won == 0)))
        return 1 / (1 + np.abs(wins - rest))

    def _fill(self, cells: np.ndarray, rng: np.random.Generator) -> UInt8[np.ndarray, "board attempt cell"]:
        """TRIES random boards for each winning cell, cells[board]. An own piece there completes at least one row."""
        share, weights = _weights(self.size, self.row, self.pieces)
        row = (rng.random((len(cells), TRIES, 1)) > share[cells][:, None]).sum(-1)
        total = rng.integers(self.pieces[0], self.pieces[1] + 1, row.shape)
        own = np.maximum((total + rng.integers(2, size=row.shape)) // 2, self.row - 1)
        # own pieces go to the cells with the earliest arrival times (sampling without replacement at rates `weights`);
        # the cells of the row come first, the winning cell, which stays empty, last
        arrival = rng.standard_exponential((*row.shape, self.size**2), dtype=np.float32) / weights[cells][:, None]
        arrival[geometry(self.size, self.row)[2].T[row] > 0] = -1
        np.put_along_axis(arrival, np.broadcast_to(cells[:, None, None], (*row.shape, 1)), np.inf, -1)
        is_own = arrival <= np.take_along_axis(np.sort(arrival, -1), own[..., None] - 1, -1)
        priority = rng.random(arrival.shape, dtype=np.float32)
        priority[is_own | np.isinf(arrival)] = 2
        last = np.take_along_axis(np.sort(priority, -1), (total - own)[..., None] - 1, -1)
        return np.where(is_own, OWN, np.where(priority <= last, OTHER, EMPTY)).astype(np.uint8)

    def _judge(self, marks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Counts rows on boards [..., cell].

        Returns, for each cell, the number of rows that an own piece there would complete [..., cell] and the same for
        the other colour [..., cell]; the number of own rows blocked by one piece of the other colour [...]; and whether
        a row is complete already [...].
        """
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
        """The first frame: the board with its pieces."""
        cell, distance, grid = _raster(self.image_size, self.size)
        marks = np.frombuffer(problem.layout.marks + bytes([EMPTY]), dtype=np.uint8)[cell]
        return PALETTE[np.where((marks != EMPTY) & (distance < DISC), marks, np.where(grid, GRID, LIGHT))]

    def video(self, problem: Problem) -> UInt8[np.ndarray, "frame height width 3"]:
        """The reference video. A red piece grows in a winning cell. Then the pieces of the row turn gold one by one,
        each from its centre outwards. Every change takes the same time."""
        board: Board = problem.layout
        cell, distance, _ = _raster(self.image_size, self.size)
        time = np.minimum(1.0, np.arange(self.frames) / (self.frames - 1 - REST)) * (1 + self.row)
        video = np.repeat(self.image(problem)[None], self.frames, axis=0)
        parts = [(board.cell, RED, 0), *((c, GOLD, 1 + i) for i, c in enumerate(board.solutions[board.cell]))]
        for where, colour, start in parts:
            y, x = np.nonzero(cell == where)
            frame, pixel = np.nonzero(distance[y, x] < DISC * np.clip(time - start, 0, 1)[:, None])
            video[frame, y[pixel], x[pixel]] = PALETTE[colour]
        return video

    def workspace(self, problem: Problem) -> Bool[np.ndarray, "height width"]:
        """Mask of the pixels that a solution may change: discs in the empty cells and in the cells of own pieces."""
        cell, distance, _ = _raster(self.image_size, self.size)
        free = np.frombuffer(problem.layout.marks + bytes([OTHER]), dtype=np.uint8) != OTHER
        return free[cell] & (distance < DISC)

    def parse(self, problem: Problem, video: Float[np.ndarray, "frame height width 3"]) -> ParsedAnswer:
        """Reads the last frame of a video with values in [0, 1].

        A cell holds the colour of more than half of the pixels around its centre. The answer is the empty cell that
        now holds a red or gold piece. It is None when there are no or several such cells, or when another piece has
        appeared, disappeared or changed its colour. Which pieces turned gold has an effect on `path` only.
        """
        check_video(video)
        cell, distance, _ = _raster(self.image_size, self.size)
        core, marks = distance < CORE, np.frombuffer(problem.layout.marks, dtype=np.uint8)
        pixels = np.asarray(video[-1], dtype=np.float32)[core] * 255.0
        apart = np.sqrt(np.square(pixels[:, None] - PALETTE.astype(np.float32)).sum(-1))
        closer = (apart[:, LIGHT] - np.minimum(apart[:, RED], apart[:, GOLD])) / 255.0
        shown = [apart.argmin(-1) == colour for colour in (RED, BLUE, GOLD)]
        red, blue, gold, score = (np.bincount(cell[core], v) / np.bincount(cell[core]) for v in (*shown, closer))
        is_own = red + gold > 0.5
        filled = np.flatnonzero(is_own & (marks == EMPTY))
        spoilt = np.flatnonzero(np.where(marks == OWN, ~is_own, (blue > 0.5) != (marks == OTHER)))
        seen = (("piece", filled), ("gold", np.flatnonzero(gold > 0.5)), ("spoilt", spoilt))
        drawn = {(name, int(c)) for name, cells in seen for c in cells}
        wanted = [{("piece", c), *(("gold", p) for p in line)} for c, line in problem.layout.solutions.items()]
        path = max(len(drawn & right) / len(drawn | right) for right in wanted)
        scores = tuple(np.where(marks == EMPTY, score, score - 4).tolist())  # a score is between -2 and 2
        return ParsedAnswer(int(filled[0]) if len(filled) == 1 and not len(spoilt) else None, scores, path)

    def solutions(self, problem: Problem) -> tuple[int, ...]:
        """The winning cells."""
        return tuple(problem.layout.solutions)

    def plausible_answers(self, problem: Problem) -> tuple[int, ...]:
        """The empty cells."""
        return tuple(cell for cell, mark in enumerate(problem.layout.marks) if mark == EMPTY)


@dataclass
class LineConfig:
    """Settings of `Line`. Raises InputError for an invalid value."""

    problems: int = 600
    "Number of problems, over all splits."
    seeds: int = 1
    "Number of noise seeds of each problem."
    image_size: int = 64
    "Side of the image in pixels, a multiple of 16 and at least 64."
    frames: int = 13
    "Number of video frames, at least 5."
    size: int = 6
    "Cells per side of the board, from 3 to 6."
    row: int = 4
    "Number of pieces in a row that win, from 3 to `size`."
    pieces: list[int] = field(default_factory=lambda: [20, 26])
    "Fewest and most pieces on the board, half of each colour."
    seed: int = 0
    "Random seed of the problems."

    def __post_init__(self) -> None:
        check_counts(self)
        self.build()

    def build(self) -> Line:
        """The task with these settings."""
        if len(self.pieces) != 2:
            raise InputError(f"task.pieces={self.pieces}: expected [fewest, most]")
        return Line(self.image_size, self.frames, self.size, self.row, (self.pieces[0], self.pieces[1]), self.seed)


FAMILY = LineConfig


@lru_cache
def _weights(n: int, k: int, pieces: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """For every winning cell: cumulative probabilities of the rows through it [cell, row], and the rates of the other
    own pieces [cell, cell].

    All directions with a row through the cell are equally likely, and so are the rows of one direction. Let c be the
    probability that the row covers another cell, and d the density of own pieces. A cell outside the row then gets an
    own piece at the rate (d - c) / (1 - c), which makes its total probability d. Near corners this is not possible
    (c > d). To make up for it, own pieces are RIM times denser at the rim of every board, and c is multiplied by THIN.
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
    """For every pixel: its cell (n * n: none), its distance from the centre of the cell in cells, and whether it is on
    a grid line."""
    position = ((np.arange(pixels) + 0.5) / pixels - MARGIN) * n / (1 - 2 * MARGIN)
    index = np.floor(position).astype(int)
    inside = (index >= 0) & (index < n)
    both = inside[:, None] & inside
    cell = np.where(both, index[:, None] * n + index, n * n)
    off = position - index - 0.5
    distance = np.where(both, np.hypot(off[:, None], off), np.inf)
    line = (0.5 - np.abs(off)) * (1 - 2 * MARGIN) / n < 0.6 / 64  # half a line: 0.6 pixels of 64
    return cell, distance, both & (line[:, None] | line)


@lru_cache
def _boxes(n: int) -> tuple[Box, ...]:
    edges = [MARGIN + i * (1 - 2 * MARGIN) / n for i in range(n + 1)]
    return tuple((edges[c], edges[r], edges[c + 1], edges[r + 1]) for r in range(n) for c in range(n))
