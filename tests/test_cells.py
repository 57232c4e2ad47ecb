from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosprobe.cells import DIFFICULTY, INPUTS, PROMPT, SOURCES, X0, Cell, Place, parse_selection


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("all", (0, 1, 2, 3, 4, 5, 6)),
        ("last", (6,)),
        ("3", (3,)),
        ("-1", (6,)),
        ("5,0,5,last", (0, 5, 6)),
        ("0:7:3", (0, 3, 6)),
        ("2:4", (2, 3)),
        (":2,-2:", (0, 1, 5, 6)),
        ("::-3", (0, 3, 6)),
        ("[0, 4]", (0, 4)),
        (" 1 , 2 ", (1, 2)),
    ],
)
def test_grammar(spec, expected):
    assert parse_selection(spec, 7, "probe.steps") == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        *((spec, "0 to 6.*7") for spec in ("7", "-8", "0:8")),
        ("4:4", "0 to 6"),
        *((spec, "all.*last.*start:stop:stride.*0 to 6") for spec in ("", "first", "1.5", "1,,2", "0:4:0", "a:b")),
    ],
)
def test_errors_name_axis_text_and_range(spec, message):
    with pytest.raises(ValueError, match=rf"^probe\.layers={re.escape(repr(spec))}.*{message}"):
        parse_selection(spec, 7, "probe.layers")


@given(st.integers(1, 60), st.data())
def test_a_list_of_indices_is_read_back_sorted_and_without_repeats(size, data):
    chosen = data.draw(st.lists(st.integers(-size, size - 1), min_size=1))
    parsed = parse_selection(",".join(map(str, chosen)), size, "axis")
    assert parsed == tuple(sorted({i % size for i in chosen}))
    assert parse_selection(",".join(map(str, parsed)), size, "axis") == parsed


@given(st.integers(1, 60), st.data())
def test_slices_mean_what_they_mean_in_python(size, data):
    start, stop = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, size))
    stride = data.draw(st.integers(1, size))
    expected = tuple(range(size)[start:stop:stride])
    if expected:
        assert parse_selection(f"{start}:{stop}:{stride}", size, "axis") == expected


def test_cells_sort_by_step_and_read_as_words():
    early, late = Cell(0, 7, "cond", "all"), Cell(3, 0, "cond", "all")
    assert sorted([late, early]) == [early, late]
    assert str(late) == "step 3, layer 0, cond, all"


def test_sources_and_inputs_are_told_apart_by_name():
    assert set(SOURCES) - set(INPUTS) == {X0}  # the clean latent is made by the blocks: it is no input
    assert {PROMPT, DIFFICULTY} < set(INPUTS) - set(SOURCES)  # one vector per sample, without frames


@pytest.mark.parametrize(
    ("position", "place"),
    [
        ("all", Place()),
        ("3", Place(frame=3)),
        ("r0c12", Place(row=0, column=12)),
        ("f2r10c1", Place(2, 10, 1)),
    ],
)
def test_positions_name_their_place(position, place):
    assert Place.of(position) == place and place.is_token == position.startswith("f")
