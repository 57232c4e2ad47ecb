"""Random mazes as graphs: rooms on a square lattice, doors between neighbouring rooms, exits in the corners."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from jaxtyping import Float, Int

Edge = tuple[int, int]

EARLY = 0.2  # relative probability of cutting a branch one door further from the fork
HINTS = {(0, 1): 0.5, (1, 1): 0.8, (1, 2): 0.3}  # weight of an open door for an exit, by the distances of its two rooms
CLOSE, FAR = -0.25, 3  # weight of a start for an exit, per room of distance; the largest distance that counts
LEAST = -1.0  # mazes with a `_hint` up to this are all kept


@dataclass(frozen=True)
class Layout:
    """A maze of `rooms` x `rooms` rooms, numbered row by row.

    passages: open doors as sorted pairs of rooms. solutions: for each reachable exit, the rooms on the way from start.
    exit: the exit that the reference video reaches.
    """

    rooms: int
    start: int
    passages: frozenset[Edge]
    solutions: dict[int, tuple[int, ...]]
    exit: int

    @property
    def corners(self) -> tuple[int, int, int, int]:
        """The rooms with the four exits, row by row."""
        return corners_of(self.rooms)


def corners_of(n: int) -> tuple[int, int, int, int]:
    """The rooms in the corners of n x n rooms, row by row."""
    return 0, n - 1, n * n - n, n * n - 1


def doors_of(n: int) -> list[Edge]:
    """All pairs of neighbouring rooms: first the horizontal pairs, then the vertical ones."""
    return [(a, a + 1) for a in range(n * n) if a % n < n - 1] + [(a, a + n) for a in range(n * n - n)]


def canonical_key(layout: Layout) -> str:
    """A hash that is the same for a maze and its images under the 8 symmetries of the square."""
    n, rooms = layout.rooms, layout.rooms**2
    places = _symmetries(n)
    moved = np.sort(places[:, list(layout.passages)], axis=2)
    doors = np.sort(moved @ [rooms, 1], axis=1)  # one number per door, in the order of the pairs
    start, *numbers = min(np.column_stack([places[:, layout.start], doors]).tolist())
    return hashlib.sha256(repr((n, (start, [divmod(door, rooms) for door in numbers]))).encode()).hexdigest()[:16]


@lru_cache
def _symmetries(n: int) -> Int[np.ndarray, "8 room"]:
    """The room to which each symmetry of the square moves each room."""
    rooms = np.arange(n * n).reshape(n, n)
    images = [turned[::up, ::left] for turned in (rooms, rooms.T) for up in (1, -1) for left in (1, -1)]
    return np.stack([np.argsort(image, axis=None) for image in images])  # argsort: the inverse permutation


def draw_layout(n: int, kind: str, rng: np.random.Generator) -> Layout:
    """Draws a maze of n x n rooms: a random spanning tree from which branches are cut.

    kind: `one_exit` (one reachable exit) or `choice` (two or three).
    A tree is accepted before the answer is drawn, and only if every choice of answer is possible in it. Otherwise the
    position of the start and the walls would predict the answer.
    Cuts predict the answer too: an exit near a wall is less likely to be reachable. Two measures reduce this. Cuts near
    the fork are more likely than cuts near the exit. A maze is kept with probability exp(LEAST - `_hint`), at most 1.
    """
    corners, doors = corners_of(n), len(_numbered_doors(n))
    while True:
        order, start = rng.permutation(doors).tolist(), int(rng.integers(n * n))
        if start in corners:
            continue
        parents = _spanning_tree(n, start, order, corners)
        if parents is None:
            continue
        walks = [_walk(start, parents, corner) for corner in corners]
        steps = [[_edge(a, b) for a, b in pairwise(walk)] for walk in walks]
        exits = rng.permutation(4).tolist()
        kept = exits[: 1 if kind == "one_exit" else int(rng.integers(2, 4))]
        shared = {edge for k in kept for edge in steps[k]}
        passages = {_edge(room, parent) for room, parent in enumerate(parents) if room != start}
        for j in exits[len(kept) :]:
            branch = [edge for edge in steps[j] if edge not in shared][:-1]  # never the door next to the exit
            if branch and all(edge in passages for edge in steps[j]):
                passages.remove(branch[np.searchsorted(_cuts(len(branch)), rng.random(), side="right")])
        alive = {k for k in range(4) if all(edge in passages for edge in steps[k])}
        if alive != set(kept):  # a third exit may have no door of its own to cut
            continue
        if rng.random() < np.exp(LEAST - _hint(n, start, passages, kept)):
            return Layout(n, start, frozenset(passages), {corners[k]: walks[k] for k in kept}, corners[kept[0]])


@lru_cache
def _cuts(doors: int) -> Float[np.ndarray, "door"]:
    """Cumulative probabilities of a cut at each door of a branch, from the fork on."""
    weight = EARLY ** np.arange(doors)
    return np.cumsum(weight / weight.sum())


def _hint(n: int, start: int, passages: set[Edge], kept: list[int]) -> float:
    """How well a linear classifier of the image could tell the reachable exits from the others.

    Mean over the reachable exits of the weights of the open doors near the exit and of the distance of the start, minus
    the same mean over the other exits. It approximates the difference in log-odds that such a classifier gives.
    """
    doors, rooms = _hints(n)
    each = [rooms[k][start] + sum(doors[k][edge] for edge in passages & doors[k].keys()) for k in range(4)]
    others = [each[k] for k in range(4) if k not in kept]
    return sum(each[k] for k in kept) / len(kept) - sum(others) / len(others)


@lru_cache
def _hints(n: int) -> tuple[list[dict[Edge, float]], list[list[float]]]:
    """Weights of open doors for each exit [exit][door], and of a start in each room [exit][room]. See `_hint`."""
    doors, rooms = [], []
    for corner in corners_of(n):
        away = [max(abs(a // n - corner // n), abs(a % n - corner % n)) for a in range(n * n)]
        rings = {(a, b): (min(away[a], away[b]), max(away[a], away[b])) for a, b in doors_of(n)}
        doors.append({edge: HINTS[ring] for edge, ring in rings.items() if ring in HINTS})
        rooms.append([CLOSE * min(FAR, away[a]) for a in range(n * n)])
    return doors, rooms


def _spanning_tree(n: int, start: int, order: Sequence[int], ends: Sequence[int]) -> list[int] | None:
    """The parent of each room in a spanning tree with root `start`; the parent of start is start.

    It is the minimum spanning tree when doors have the weights 0, 1, ... in the order of `order` (Prim's algorithm).
    None if one of the last two rooms on the way to one of the `ends` is also on the way to another.
    """
    doors, around, parents = _numbered_doors(n), _doors_around(n), [-1] * (n * n)
    # sets of doors are integers: bit i stands for order[i], so the lowest bit is the door of the smallest weight
    bits = [0] * len(order)
    for i, door in enumerate(order):
        bits[door] = 1 << i
    parents[start] = start
    frontier = 0  # doors between a room of the tree and another
    for door in around[start]:
        frontier ^= bits[door]
    # the last rooms before the ends found so far, and all rooms on the way there
    doorsteps, passed = set[int](), {start}
    while frontier:
        before, room = doors[order[(frontier & -frontier).bit_length() - 1]]
        if parents[before] < 0:
            before, room = room, before
        parents[room] = before
        if room in ends:
            if before in passed:
                return None
            above = before
            while above != start:
                passed.add(above)
                above = parents[above]
                if above in doorsteps:
                    return None
            doorsteps.add(before)
        for door in around[room]:
            frontier ^= bits[door]  # a door between two rooms of the tree is taken out again
    return parents


_numbered_doors = lru_cache(doors_of)


@lru_cache
def _doors_around(n: int) -> list[list[int]]:
    """For each room its doors, as indices into `doors_of`."""
    around: list[list[int]] = [[] for _ in range(n * n)]
    for door, (a, b) in enumerate(doors_of(n)):
        around[a].append(door)
        around[b].append(door)
    return around


def _walk(start: int, parents: list[int], end: int) -> tuple[int, ...]:
    """The rooms on the way from start to end, both included."""
    walk = [end]
    while walk[-1] != start:
        walk.append(parents[walk[-1]])
    return tuple(reversed(walk))


def _edge(a: int, b: int) -> Edge:
    return (a, b) if a < b else (b, a)
