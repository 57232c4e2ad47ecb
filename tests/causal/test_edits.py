"""What edits refuse, and how they are written to a file and read again."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cosprobe.causal.edits import HOW, SOURCED, Edit, load_edits, save_edits
from cosprobe.errors import InputError

GOOD = {"noise": {}, "swap": {"source": "a"}, "steer": {"source": "a", "layers": (1,)},
        "erase": {"source": "a", "layers": (1,)}, "ablate": {"layers": (1,)}}  # fmt: skip
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("edits")


def refusal(make, *args, **kwargs) -> str:
    """The message that something is refused with, which is one line."""
    with pytest.raises(InputError) as raised:
        make(*args, **kwargs)
    assert len(str(raised.value).splitlines()) == 1
    return str(raised.value)


def test_every_kind_has_an_example_here():
    assert set(GOOD) == set(HOW)


@pytest.mark.parametrize("kind", HOW)
def test_the_first_way_of_a_kind_is_its_default(kind):
    assert Edit(kind, **GOOD[kind]) == Edit(kind, HOW[kind][0], **GOOD[kind])
    for how in HOW[kind]:
        assert Edit(kind, how, **GOOD[kind]).how == (how or HOW[kind][0])


@pytest.mark.parametrize(
    ("kind", "fields", "names"),
    [
        ("melt", {}, ("melt", "noise, swap")),
        ("noise", {"how": "zero"}, ("how='zero'", "fresh, damage, renoised")),
        ("swap", {"how": "fresh"}, ("how='fresh'", "none")),
        ("noise", {"layers": (1,)}, ("layers=[1]", "latent")),
        ("noise", {"source": "a"}, ("source='a'", "noise")),
        ("ablate", {"source": "a"}, ("source='a'", "ablate")),
        ("noise", {"branch": "cond"}, ("branch='cond'", "latent")),
        ("swap", {"expert": "high"}, ("expert='high'", "latent")),
        ("swap", {"source": ""}, ("source", "swap")),
        ("swap", {"seed": 3}, ("seed=3", "swap")),
        *((kind, {"layers": ()}, ("layers=[]", kind)) for kind in ("steer", "erase", "ablate")),
        ("ablate", {"branch": "both"}, ("branch='both'", "cond, uncond")),
        ("ablate", {"layers": (-1,)}, ("layers=[-1]",)),
        ("noise", {"steps": (0, 1.0)}, ("steps=[0, 1.0]",)),
        ("noise", {"steps": (True,)}, ("steps=[True]",)),
        ("noise", {"frames": 2}, ("frames=2",)),
        ("noise", {"regions": "12"}, ("regions='12'",)),
        *(("noise", {"amount": v}, ("amount",)) for v in (float("nan"), float("inf"), 10**400, True, "1", None)),
        ("noise", {"how": "damage", "amount": -1.0}, ("amount=-1", "0 or more")),
        ("noise", {"seed": 1.5}, ("seed=1.5",)),
        ("noise", {"seed": True}, ("seed=True",)),
        ("noise", {"how": None}, ("how=None",)),
        ("noise", {"how": ["fresh"]}, ("how=['fresh']",)),
        ("swap", {"source": ["a"]}, ("source=['a']",)),
        ("swap", {"source": "a\nb"}, (r"source='a\nb'",)),
        (["noise"], {}, ("kind=['noise']",)),
    ],
)  # fmt: skip
def test_an_edit_that_cannot_be_is_refused_with_its_value(kind, fields, names):
    message = refusal(Edit, **{"kind": kind, **(GOOD.get(kind, {}) if isinstance(kind, str) else {}), **fields})
    assert all(name in message for name in names)


def test_an_edit_is_written_as_what_it_changes():
    assert str(Edit("swap", steps=(0,), layers=(20,), source="donor")) == "swap steps=[0] layers=[20] source=donor"


@given(
    st.sampled_from(sorted(HOW)), st.data(), st.floats(0, 1e300), st.integers(), st.text("abc:#'\"- é\\", min_size=1),
    *(st.lists(st.integers(0, 99), max_size=3) for _ in range(3)),
)  # fmt: skip
def test_what_is_saved_is_read_again(folder, kind, data, amount, seed, source, steps, frames, regions):
    source, seed = (source if kind in SOURCED else ""), (seed if kind == "noise" else 0)
    given = {**GOOD[kind], "source": source, "seed": seed, "amount": amount, "steps": steps, "frames": frames}
    edit = Edit(kind, data.draw(st.sampled_from(HOW[kind])), **given, regions=regions)
    more = Edit("ablate", layers=(0, 2), branch="uncond", expert="low")
    save_edits([edit, more], folder / "edits.yaml")
    assert load_edits(folder / "edits.yaml") == load_edits(str(folder / "edits.yaml")) == [edit, more]


def test_no_edits_are_an_empty_list(folder):
    save_edits([], folder / "edits.yaml")
    assert load_edits(folder / "edits.yaml") == []


@given(st.sampled_from([*asdict(Edit("noise")), "other"]), JUNK)
def test_a_field_with_any_value_gives_an_edit_of_right_types_or_one_line(folder, name, value):
    path = folder / "junk.yaml"
    entry = {"kind": "noise"} | {name: value}
    path.write_text(yaml.safe_dump([entry]))
    try:
        (edit,) = load_edits(path)
    except InputError:
        assert str(path) in refusal(load_edits, path)
        return
    wanted = {"steps": tuple, "frames": tuple, "regions": tuple, "layers": tuple, "seed": int}
    assert isinstance(getattr(edit, name), wanted.get(name, int | float if name == "amount" else str))
    assert not isinstance(getattr(edit, name), bool)
    before = list(value) if isinstance(value, list) else value
    now = getattr(edit, name)
    assert (list(now) if isinstance(now, tuple) else now) in (before, "fresh")  # `how` is filled in


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("kind: noise", ("list",)),
        ("", ("list",)),
        ("- noise", ("list",)),
        ("- {kind: noise, dose: 2}", ("'dose'", "amount")),
        ("- {kind: noise, 3: 2}", ("'3'",)),
        ("- {steps: [1]}", ("kind",)),
        ("- {kind: noise, steps: 1}", ("steps=1",)),
        ("- {kind: noise, steps: {0: 1}}", ("steps={0: 1}",)),
        ("- {kind: noise, steps: [true]}", ("steps=[True]",)),
        ("- {kind: noise, amount: 1e-3}", ("amount='1e-3'",)),  # text in YAML 1.1
        ("- {kind: noise, amount: yes}", ("amount=True",)),
        ("- {kind: noise, amount: .inf}", ("amount=inf",)),
        ("- {kind: no}", ("kind=False",)),
        ("- {kind: 2001-13-45}", ("no YAML",)),
        ("- {kind: noise", ("no YAML",)),
        ("- !!python/object:os.system {}", ("no YAML",)),
        ("- &a [*a]", ("list",)),
        ("[" * 1500, ("no YAML",)),
        ("\x00", ("no YAML",)),
    ],
)
def test_a_file_that_is_no_list_of_edits_is_refused_in_one_line(folder, text, names):
    path = folder / "bad.yaml"
    path.write_text(text)
    message = refusal(load_edits, path)
    assert str(path) in message and all(name in message for name in names)


def test_a_missing_file_and_other_text_are_refused(folder):
    assert "none.yaml" in refusal(load_edits, folder / "none.yaml")
    assert str(folder) in refusal(load_edits, folder)
    (folder / "latin.yaml").write_bytes("- {kind: é}".encode("latin-1"))
    assert "latin.yaml" in refusal(load_edits, folder / "latin.yaml")


def test_an_edit_cannot_be_changed_into_a_wrong_one():
    assert "steps=[-1]" in refusal(replace, Edit("noise"), steps=(-1,))
