"""Random mazes as graphs: rooms on a square lattice, doors between neighbours, candidate exits at the corners."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from jaxtyping import Int

Edge = tuple[int, int]

EARLY = 0.2  # how much rarer a branch is cut one door further from the fork
HINTS = {(0, 1): 0.5, (1, 1): 0.8, (1, 2): 0.3}  # what an open door tells of an exit, by rooms from it to both sides
CLOSE, FAR = -0.25, 3  # what each room between start and exit tells, up to so many
LEAST = -1.0  # mazes that tell no more than this are all kept


@dataclass(frozen=True)
class Layout:
    """A maze of `rooms` x `rooms` rooms, numbered row by row.

    passages: open doors as sorted pairs of rooms. solutions: the walk from start to each reachable exit.
    exit: the exit the reference video walks to.
    """

    rooms: int
    start: int
    passages: frozenset[Edge]
    solutions: dict[int, tuple[int, ...]]
    exit: int

    @property
    def corners(self) -> tuple[int, int, int, int]:
        return corners_of(self.rooms)


def corners_of(n: int) -> tuple[int, int, int, int]:
    """The rooms in the corners of n x n rooms, row by row."""
    return 0, n - 1, n * n - n, n * n - 1


def doors_of(n: int) -> list[Edge]:
    """Every pair of neighbouring rooms: those side by side, then those above each other."""
    return [(a, a + 1) for a in range(n * n) if a % n < n - 1] + [(a, a + n) for a in range(n * n - n)]


def canonical_key(layout: Layout) -> str:
    """Identity under the 8 symmetries of the square: the smallest description over all of them."""
    n, rooms = layout.rooms, layout.rooms**2
    places = _symmetries(n)
    moved = np.sort(places[:, list(layout.passages)], axis=2)
    doors = np.sort(moved @ [rooms, 1], axis=1)  # a number per door, in the order of pairs
    start, *numbers = min(np.column_stack([places[:, layout.start], doors]).tolist())
    return hashlib.sha256(repr((n, (start, [divmod(door, rooms) for door in numbers]))).encode()).hexdigest()[:16]


@lru_cache
def _symmetries(n: int) -> Int[np.ndarray, "8 room"]:
    """Where each room lands under each symmetry of the square."""
    rooms = np.arange(n * n).reshape(n, n)
    images = [turned[::up, ::left] for turned in (rooms, rooms.T) for up in (1, -1) for left in (1, -1)]
    return np.stack([np.argsort(image, axis=None) for image in images])  # the room at a place, turned round


def draw_layout(n: int, kind: str, rng: np.random.Generator) -> Layout:
    """Draws a spanning tree, then cuts branches.

    Whether a tree is used is decided before the answer is drawn and must not depend on it, or the places of
    start and walls would tell the answer: a tree is kept only if every choice of answer could be cut out of it.
    The cuts tell something all the same: a wall close to an exit speaks against it. So they are made close to the
    fork, and a maze is kept the more rarely the more its doors speak for the exits that can be reached (`_hint`).
    """
    corners, doors = corners_of(n), doors_of(n)
    while True:
        shuffled, start = rng.permutation(len(doors)).tolist(), int(rng.integers(n * n))
        if start in corners:
            continue
        tree, beside = _spanning_tree(n, [doors[i] for i in shuffled])
        parents = _parents(start, beside)
        if not _apart(start, parents, corners):
            continue
        walks = [_walk(start, parents, corner) for corner in corners]
        steps = [[_edge(a, b) for a, b in pairwise(walk)] for walk in walks]
        order = [int(k) for k in rng.permutation(4)]
        kept = order[: 1 if kind == "one_exit" else int(rng.integers(2, 4))]
        shared = {edge for k in kept for edge in steps[k]}
        passages = set(tree)
        for j in order[len(kept) :]:
            branch = [edge for edge in steps[j] if edge not in shared][:-1]  # never the exit's own doorstep
            if branch and all(edge in passages for edge in steps[j]):
                weight = EARLY ** np.arange(len(branch))
                passages.remove(branch[rng.choice(len(branch), p=weight / weight.sum())])
        alive = {k for k in range(4) if all(edge in passages for edge in steps[k])}
        if alive != set(kept):  # two kept exits may leave a third no private branch
            continue
        if rng.random() < np.exp(LEAST - _hint(n, start, passages, kept)):
            return Layout(n, start, frozenset(passages), {corners[k]: walks[k] for k in kept}, corners[kept[0]])


def _hint(n: int, start: int, passages: set[Edge], kept: list[int]) -> float:
    """How much more the open doors near them, and a start near them, speak for the exits that can be reached than for
    the others: about the log odds that a linear classifier of the picture gives them."""
    doors, rooms = _hints(n)
    each = np.array([rooms[k][start] + sum(doors[k].get(edge, 0.0) for edge in passages) for k in range(4)])
    others = [k for k in range(4) if k not in kept]
    return float(each[kept].mean() - each[others].mean())


@lru_cache
def _hints(n: int) -> tuple[list[dict[Edge, float]], list[list[float]]]:
    """What each open door tells of each exit [exit][door], and a start in each room [exit][room]."""
    doors, rooms = [], []
    for corner in corners_of(n):
        away = [max(abs(a // n - corner // n), abs(a % n - corner % n)) for a in range(n * n)]
        rings = {(a, b): (min(away[a], away[b]), max(away[a], away[b])) for a, b in doors_of(n)}
        doors.append({edge: HINTS[ring] for edge, ring in rings.items() if ring in HINTS})
        rooms.append([CLOSE * min(FAR, away[a]) for a in range(n * n)])
    return doors, rooms


def _spanning_tree(n: int, doors: Sequence[Edge]) -> tuple[list[Edge], list[list[int]]]:
    """The doors that join rooms not joined yet by those before them, in their order; and each room's neighbours."""
    group, members = list(range(n * n)), [[room] for room in range(n * n)]
    tree: list[Edge] = []
    beside: list[list[int]] = [[] for _ in range(n * n)]
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
            beside[a].append(b)
            beside[b].append(a)
            if len(tree) == n * n - 1:
                break
    return tree, beside


def _parents(start: int, beside: list[list[int]]) -> list[int]:
    """The room before each on its walk from start; start's is itself."""
    parents, frontier = [-1] * len(beside), [start]
    parents[start] = start
    for a in frontier:  # grows on the way
        for b in beside[a]:
            if parents[b] < 0:
                parents[b] = a
                frontier.append(b)
    return parents


def _apart(start: int, parents: list[int], ends: Sequence[int]) -> bool:
    """Whether the last two rooms of the walk from start to each end are on the walk to no other."""
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
    """The rooms from start to end, both included."""
    walk = [end]
    while walk[-1] != start:
        walk.append(parents[walk[-1]])
    return tuple(reversed(walk))


def _edge(a: int, b: int) -> Edge:
    return (a, b) if a < b else (b, a)
