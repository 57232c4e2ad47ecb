"""Random mazes as graphs: rooms on a square lattice, doors between neighbouring rooms, exits in the corners."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from jaxtyping import Int

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
    corners, doors = corners_of(n), doors_of(n)
    while True:
        shuffled, start = rng.permutation(len(doors)).tolist(), int(rng.integers(n * n))
        if start in corners:
            continue
        tree, neighbours = _spanning_tree(n, [doors[i] for i in shuffled])
        parents = _parents(start, neighbours)
        if not _apart(start, parents, corners):
            continue
        walks = [_walk(start, parents, corner) for corner in corners]
        steps = [[_edge(a, b) for a, b in pairwise(walk)] for walk in walks]
        order = [int(k) for k in rng.permutation(4)]
        kept = order[: 1 if kind == "one_exit" else int(rng.integers(2, 4))]
        shared = {edge for k in kept for edge in steps[k]}
        passages = set(tree)
        for j in order[len(kept) :]:
            branch = [edge for edge in steps[j] if edge not in shared][:-1]  # never the door next to the exit
            if branch and all(edge in passages for edge in steps[j]):
                weight = EARLY ** np.arange(len(branch))
                passages.remove(branch[rng.choice(len(branch), p=weight / weight.sum())])
        alive = {k for k in range(4) if all(edge in passages for edge in steps[k])}
        if alive != set(kept):  # a third exit may have no door of its own to cut
            continue
        if rng.random() < np.exp(LEAST - _hint(n, start, passages, kept)):
            return Layout(n, start, frozenset(passages), {corners[k]: walks[k] for k in kept}, corners[kept[0]])


def _hint(n: int, start: int, passages: set[Edge], kept: list[int]) -> float:
    """How well a linear classifier of the image could tell the reachable exits from the others.

    Mean over the reachable exits of the weights of the open doors near the exit and of the distance of the start, minus
    the same mean over the other exits. It approximates the difference in log-odds that such a classifier gives.
    """
    doors, rooms = _hints(n)
    each = np.array([rooms[k][start] + sum(doors[k].get(edge, 0.0) for edge in passages) for k in range(4)])
    others = [k for k in range(4) if k not in kept]
    return float(each[kept].mean() - each[others].mean())


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


def _spanning_tree(n: int, doors: Sequence[Edge]) -> tuple[list[Edge], list[list[int]]]:
    """A spanning tree, by Kruskal's algorithm in the order of `doors`: its doors, and the neighbours of each room."""
    group, members = list(range(n * n)), [[room] for room in range(n * n)]
    tree: list[Edge] = []
    neighbours: list[list[int]] = [[] for _ in range(n * n)]
    for door in doors:
        a, b = door
        larger, smaller = group[a], group[b]
        if larger != smaller:
            if len(members[larger]) < len(members[smaller]):
                larger, smaller = smaller, larger
            for room in members[smaller]:
                group[room] = larger
            members[larger] += members[smaller]
            tree.append(door)
            neighbours[a].append(b)
            neighbours[b].append(a)
            if len(tree) == n * n - 1:
                break
    return tree, neighbours


def _parents(start: int, neighbours: list[list[int]]) -> list[int]:
    """The room before each room on the way from start. The parent of start is start."""
    parents, frontier = [-1] * len(neighbours), [start]
    parents[start] = start
    for a in frontier:  # the list grows during the loop
        for b in neighbours[a]:
            if parents[b] < 0:
                parents[b] = a
                frontier.append(b)
    return parents


def _apart(start: int, parents: list[int], ends: Sequence[int]) -> bool:
    """Whether the last two rooms on the way from start to each end are on the way to no other end."""
    doorsteps = [parents[end] for end in ends]
    if start in doorsteps or len({*doorsteps}) < len(ends):
        return False
    for room in doorsteps:
        while room != start:
            room = parents[room]
            if room in doorsteps:
                return False
    return True


def _walk(start: int, parents: list[int], end: int) -> tuple[int, ...]:
    """The rooms on the way from start to end, both included."""
    walk = [end]
    while walk[-1] != start:
        walk.append(parents[walk[-1]])
    return tuple(reversed(walk))


def _edge(a: int, b: int) -> Edge:
    return (a, b) if a < b else (b, a)
