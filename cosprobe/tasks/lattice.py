"""Random mazes as graphs: rooms on a square lattice, doors between neighbours, candidate exits at the corners."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, permutations

import numpy as np

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
    n = layout.rooms
    rooms = np.arange(n * n).reshape(n, n)
    descriptions = []
    for turned in (rooms, rooms.T):
        for flipped in (turned, turned[::-1], turned[:, ::-1], turned[::-1, ::-1]):
            # flipped[i, j] is the room that lands at (i, j); invert it to send rooms to their new places
            place = np.empty(n * n, dtype=int)
            place[flipped.ravel()] = np.arange(n * n)
            edges = sorted(tuple(sorted((int(place[a]), int(place[b])))) for a, b in layout.passages)
            descriptions.append((int(place[layout.start]), edges))
    return hashlib.sha256(repr((n, min(descriptions))).encode()).hexdigest()[:16]


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
        tree = _spanning_tree(n, [doors[i] for i in shuffled])
        walks = _walks(start, tree, corners, n)
        if walks is None or any(_private(a, b) < 2 for a, b in permutations(walks, 2)):
            continue
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


def _spanning_tree(n: int, doors: Sequence[Edge]) -> list[Edge]:
    """The doors that join rooms not joined yet by those before them, in their order."""
    group = list(range(n * n))
    members = [[room] for room in range(n * n)]
    tree: list[Edge] = []
    for a, b in doors:
        larger, smaller = group[a], group[b]
        if larger != smaller:
            if len(members[larger]) < len(members[smaller]):
                larger, smaller = smaller, larger
            for room in members[smaller]:
                group[room] = larger
            members[larger] += members[smaller]
            tree.append((a, b))
            if len(tree) == n * n - 1:
                break
    return tree


def _walks(start: int, tree: Sequence[Edge], ends: Sequence[int], n: int) -> list[tuple[int, ...]] | None:
    """The unique walk in the tree from start to each end, both included; None when one leads through another end."""
    beside: list[list[int]] = [[] for _ in range(n * n)]
    for a, b in tree:
        beside[a].append(b)
        beside[b].append(a)
    came_from, frontier = [-1] * (n * n), [start]
    came_from[start] = start
    while frontier:
        a = frontier.pop()
        for b in beside[a]:
            if came_from[b] < 0:
                came_from[b] = a
                frontier.append(b)
    walks = []
    for end in ends:
        walk = [end]
        while walk[-1] != start:
            walk.append(came_from[walk[-1]])
            if walk[-1] in ends:
                return None
        walks.append(tuple(reversed(walk)))
    return walks


def _private(walk: Sequence[int], other: Sequence[int]) -> int:
    """Doors of a walk that another one from the same start does not go through."""
    shared = next(i for i, (a, b) in enumerate(zip(walk, other, strict=False)) if a != b)
    return len(walk) - shared


def _edge(a: int, b: int) -> Edge:
    return (a, b) if a < b else (b, a)
