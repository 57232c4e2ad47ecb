from __future__ import annotations

import json
import random
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cosprobe.activations.store import ActivationStore
from tests.examples import processes

NOTES = {"steps": [0, 1]}
NAMES = [f"problem {i}" for i in range(8)]


def rows(index):
    """The samples of a shard: two of NAMES."""
    return {"": NAMES[2 * index : 2 * index + 2]}


def shard(index, dtype=torch.float32):
    values = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(index))
    return {"features": values.to(dtype), "model_answer": torch.tensor([index, -1])}


def filled(folder, shards=3, **settings):
    store = ActivationStore(folder, {"seed": 0} | settings)
    store.begin(1000)
    for index in range(shards):
        store.write(rows(index), shard(index), NOTES)
    store.finish(NAMES[: 2 * shards])
    return store


def test_a_group_has_samples_of_its_own(tmp_path):
    store = ActivationStore(tmp_path / "store", {"seed": 0})
    store.begin(1000)
    for index in range(3):
        few = rows(index)[""][: 2 - index]
        extra = {"few.values": torch.full((2 - index,), index)} if few else {}
        store.write(rows(index) | ({"few.": few} if few else {}), shard(index) | extra, NOTES)
    store.finish(NAMES[:6])
    tensors, notes = store.read("few.")
    assert {name: value.tolist() for name, value in tensors.items()} == {"few.values": [0, 0, 1]} and notes == NOTES
    assert store.names("few.") == [NAMES[0], NAMES[1], NAMES[2]] and store.read("none.") == ({}, {})
    assert store.missing(NAMES[:4], "few.") == [NAMES[3]] and not store.missing(NAMES[:6])
    assert store.read("few.", [NAMES[2], NAMES[0]])[0]["few.values"].tolist() == [1, 0]
    whole, _ = store.read()
    assert len(whole["features"]) == 6 and "few.values" not in whole


def test_round_trip(tmp_path):
    filled(tmp_path / "store")
    store = ActivationStore.open(tmp_path / "store")
    tensors, notes = store.read()
    assert notes == NOTES and store.complete(NAMES[:6]) and not store.complete(NAMES) and store.names() == NAMES[:6]
    assert torch.equal(tensors["features"], torch.cat([shard(i)["features"] for i in range(3)]))
    assert tensors["model_answer"].tolist() == [0, -1, 1, -1, 2, -1]


@pytest.mark.slow
@given(order=st.permutations(range(6)), count=st.integers(1, 6))
def test_samples_are_read_in_the_order_asked_for(tmp_path_factory, order, count):
    store = filled(tmp_path_factory.mktemp("store"))
    whole = store.read()[0]["features"]
    tensors, _ = store.read(names=[NAMES[i] for i in order[:count]])
    assert torch.equal(tensors["features"], whole[order[:count]])
    assert tensors["model_answer"].tolist() == [[0, -1, 1, -1, 2, -1][i] for i in order[:count]]


def test_a_store_grows_and_what_it_held_stays(tmp_path):
    store = filled(tmp_path / "store", shards=2)
    before = {path.name: path.stat().st_mtime_ns for path in store.folder.glob("shard-*")}
    assert store.missing(NAMES[:7]) == NAMES[4:7]
    more = {"": NAMES[4:7]}
    values = {"features": torch.ones(3, 3, 4), "model_answer": torch.tensor([7, 8, 9])}
    store.write(more, values, NOTES)
    assert store.names() == NAMES[:4]  # a shard of a run that did not finish is not listed
    assert store.missing(NAMES[:7]) == []  # but the next run finds it
    store.finish(NAMES[2:7])
    assert store.names() == NAMES[:7]
    assert store.read(names=NAMES[3:6])[0]["model_answer"].tolist() == [-1, 7, 8]
    assert {name: (store.folder / name).stat().st_mtime_ns for name in before} == before


def test_a_sample_in_two_shards_is_read_from_the_first(tmp_path):
    store = filled(tmp_path / "store", shards=2)
    twice = {"": [NAMES[1], NAMES[4]], "few.": [NAMES[1]]}
    values = {"features": torch.zeros(2, 3, 4), "model_answer": torch.tensor([5, 5]), "few.x": torch.tensor([3])}
    store.write(twice, values, NOTES)
    store.finish(NAMES[:5])
    assert store.read(names=NAMES[:5])[0]["model_answer"].tolist() == [0, -1, 1, -1, 5]
    assert store.read("few.", [NAMES[1]])[0]["few.x"].tolist() == [3]


@pytest.mark.slow
@given(dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]), cut=st.integers(0, 4))
def test_dtypes_are_kept_over_any_resume_point(tmp_path_factory, dtype, cut):
    folder = tmp_path_factory.mktemp("store")
    for part in (range(cut), range(cut, 4)):
        store = ActivationStore(folder, {"a": 1})
        store.begin(1)
        assert store.missing(NAMES) == NAMES[2 * part.start :]
        for index in part:
            store.write(rows(index), shard(index, dtype), NOTES)
    store.finish(NAMES)
    features = store.read()[0]["features"]
    assert features.dtype == dtype
    assert torch.equal(features, torch.cat([shard(i, dtype)["features"] for i in range(4)]))


def writer(folder, begun):
    store = ActivationStore(folder, {"seed": 0})
    store.begin(1000)
    begun.set()
    names = [str(i) for i in range(60)]
    for name in store.missing(names)[::2]:
        index = int(name) // 2
        store.write({"": names[2 * index : 2 * index + 2]}, shard(index), NOTES)
        time.sleep(0.01)
    store.finish(names)


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_from_there(tmp_path):
    folder, chance = tmp_path / "store", random.Random(3)
    names = [str(i) for i in range(60)]
    for _ in range(4):
        begun = processes.CONTEXT.Event()
        process = processes.start(writer, folder, begun)
        assert begun.wait(100)
        time.sleep(chance.uniform(0.0, 0.12))
        process.kill()
        process.join()
        store = ActivationStore(folder, {"seed": 0})
        written = 60 - len(store.missing(names))
        if not store.complete(names):
            with pytest.raises(ValueError, match="half-written" if written else "half-written|missing"):
                ActivationStore.open(folder)
    begun = processes.CONTEXT.Event()
    process = processes.start(writer, folder, begun)
    process.join()
    assert process.exitcode == 0
    tensors, _ = ActivationStore.open(folder).read()
    assert torch.equal(tensors["features"], torch.cat([shard(i)["features"] for i in range(30)]))
    assert not list(folder.glob(".*"))


def test_files_of_others_are_left_in_the_folder(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / ".notes").write_text("mine")
    (tmp_path / "store" / ".cache").mkdir()
    filled(tmp_path / "store")
    assert (tmp_path / "store" / ".notes").read_text() == "mine"


@pytest.mark.parametrize("held", ["model_index.json", "vae/config.json"])
def test_no_store_is_begun_in_a_folder_of_something_else(tmp_path, held):
    path = tmp_path / "wan" / held
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    with pytest.raises(ValueError, match=rf"/wan'.*'{held.split('/')[0]}'.*store"):
        filled(tmp_path / "wan")
    assert [file for file in (tmp_path / "wan").rglob("*") if file.is_file()] == [path]


def test_a_truncated_shard_is_named(tmp_path):
    store = filled(tmp_path / "store")
    path = store.path(rows(1))
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match=rf"{path.name}.*damaged.*train\.py"):
        store.missing(NAMES)
    with pytest.raises(ValueError, match=rf"{path.name}.*damaged.*train\.py"):
        store.read()


def test_a_flipped_bit_is_found(tmp_path):
    store = filled(tmp_path / "store")
    path = store.path(rows(2))
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path.name}.*checksum.*train\.py"):
        store.read()


@pytest.mark.parametrize("change", [(b'{\\"steps\\"', b'[\\"steps\\"'), (b'"notes":', b'"motes":')])
def test_damaged_notes_are_found(tmp_path, change):
    """Of every shard, so that they do not differ from each other."""
    store = filled(tmp_path / "store")
    for path in store.folder.glob("shard-*"):
        content = path.read_bytes()
        assert content.count(change[0]) == 1
        path.write_bytes(content.replace(*change))
    with pytest.raises(ValueError, match=r"shard-.*damaged.*train\.py"):
        store.read()


def test_a_foreign_shard_is_named(tmp_path):
    store = filled(tmp_path / "store")
    other = filled(tmp_path / "other", seed=1)
    path = store.path(rows(0))
    path.write_bytes(other.path(rows(0)).read_bytes())
    with pytest.raises(ValueError, match=rf"{path.name}.*{store.fingerprint}.*{other.fingerprint}.*train\.py"):
        store.missing(NAMES)
    path.write_bytes(store.path(rows(1)).read_bytes())
    with pytest.raises(ValueError, match=rf"{path.name}.*train\.py"):
        store.read()


def test_a_deleted_shard_is_missing_again(tmp_path):
    store = filled(tmp_path / "store")
    store.path(rows(1)).unlink()
    with pytest.raises(ValueError, match=r"problem 2.*missing.*train\.py"):
        store.read()
    assert store.missing(NAMES[:6]) == NAMES[2:4]
    store.write(rows(1), shard(1), NOTES)
    store.finish(NAMES[:6])
    assert torch.equal(store.read(names=NAMES[2:4])[0]["features"], shard(1)["features"])


def test_other_settings_in_the_same_folder_are_refused_by_name(tmp_path):
    filled(tmp_path / "store", steps=20)
    with pytest.raises(ValueError, match=r"run_dir.*\bsteps=20\b.*\bsteps=10\b"):
        ActivationStore(tmp_path / "store", {"seed": 0, "steps": 10}).begin(10)


def test_other_settings_of_the_same_group_are_named_too(tmp_path):
    model = {"transformer": "a", "scheduler": "b", "vae": "c", "index": "d"}
    filled(tmp_path / "store", model=model, steps=20)
    changed = {"seed": 0, "model": model | {"vae": "x", "scheduler": "y", "adapters": "z"}, "steps": 10}
    with pytest.raises(ValueError, match=r'model\.adapters=null, now model\.adapters="z"') as caught:
        ActivationStore(tmp_path / "store", changed).begin(10)
    assert "(model.scheduler, model.vae differ too)" in str(caught.value) and "steps" not in str(caught.value)


def test_missing_and_half_written_stores(tmp_path):
    with pytest.raises(ValueError, match=r"/none\b.*missing.*manifest\.json.*train\.py"):
        ActivationStore.open(tmp_path / "none")
    store = ActivationStore(tmp_path / "half", {})
    store.begin(10)
    store.write(rows(0), shard(0), NOTES)
    with pytest.raises(ValueError, match=r"/half\b.*problem 2\b.*\b4\b"):
        store.finish(NAMES[:4])
    with pytest.raises(ValueError, match=r"/half\b.*half-written.*manifest\.json.*train\.py"):
        ActivationStore.open(tmp_path / "half")
    (tmp_path / "half" / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"/half/manifest\.json.*damaged"):
        ActivationStore.open(tmp_path / "half")


def test_a_store_of_an_earlier_version_is_refused_in_one_line(tmp_path):
    store = filled(tmp_path / "store")
    (store.folder / "settings.json").write_text(json.dumps({"seed": 0}))  # as it was before stores had a layout
    with pytest.raises(ValueError, match=r"/store\b.*layout 1\b.*\b4\b.*run_dir"):
        ActivationStore.open(store.folder)
    with pytest.raises(ValueError, match=r"/store\b.*layout 1\b"):
        store.begin(1)


def test_shards_with_other_axes_are_refused(tmp_path):
    store = filled(tmp_path / "store", shards=2)
    store.write(rows(2), shard(2), {"steps": [0]})
    store.finish(NAMES[:6])
    assert store.read(names=NAMES[:4])[1] == NOTES
    with pytest.raises(ValueError, match=r"/store\b.*axes"):
        store.read()


def test_a_store_too_large_for_the_disk_is_refused_before_it_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"\b1000000\.0 GB.*GB.*store.*run_dir"):
        ActivationStore(tmp_path / "store", {}).begin(10**15)
    assert not list((tmp_path / "store").glob("shard*"))
    assert not (tmp_path / "store" / "settings.json").exists()


def test_fingerprint_follows_the_settings_and_nothing_else(tmp_path):
    first = ActivationStore(tmp_path, {"a": 1, "b": [1, 2]})
    assert first.fingerprint == ActivationStore(tmp_path / "x", json.loads('{"b": [1, 2], "a": 1}')).fingerprint
    assert first.fingerprint == ActivationStore(tmp_path, first.settings, {"layers": "1"}).fingerprint
    assert first.fingerprint != ActivationStore(tmp_path, {"a": 1, "b": [2, 1]}).fingerprint


def test_a_store_opens_from_a_text_and_prints_what_it_holds(tmp_path):
    store = filled(tmp_path / "store", shards=3, task={"problems": "<9>"})
    again = ActivationStore.open(str(tmp_path / "store"))
    assert again == store and "6 samples in 3 shards" in repr(again)
    page = again._repr_html_()
    assert "task.problems" in page and "&lt;9&gt;" in page and "<9>" not in page
