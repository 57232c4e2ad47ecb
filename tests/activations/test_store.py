from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cosprobe.activations.store import ActivationStore

NOTES = {"steps": [0, 1]}


def shard(index, dtype=torch.float32):
    values = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(index))
    return {"features": values.to(dtype), "model_answer": torch.tensor([index, -1])}


def filled(folder, shards=3, **settings):
    store = ActivationStore(folder, {"seed": 0} | settings, shards)
    store.begin(1000)
    for index in store.missing():
        store.write(index, shard(index), NOTES)
    store.finish()
    return store


def test_names_that_few_shards_hold_are_read_from_those_alone(tmp_path):
    store = ActivationStore(tmp_path / "store", {"seed": 0}, 3)
    store.begin(1000)
    for index in range(3):
        extra = {"few.values": torch.full((2 - index,), index)} if index < 2 else {}
        store.write(index, shard(index) | extra, NOTES)
    store.finish()
    tensors, notes = store.read("few.")
    assert {name: value.tolist() for name, value in tensors.items()} == {"few.values": [0, 0, 1]} and notes == NOTES
    assert store.read("none.")[0] == {}
    whole, _ = store.read()
    assert len(whole["features"]) == 6 and torch.equal(whole["few.values"], tensors["few.values"])


def test_round_trip(tmp_path):
    filled(tmp_path / "store")
    store = ActivationStore.open(tmp_path / "store")
    tensors, notes = store.read()
    assert notes == NOTES and store.complete
    assert torch.equal(tensors["features"], torch.cat([shard(i)["features"] for i in range(3)]))
    assert tensors["model_answer"].tolist() == [0, -1, 1, -1, 2, -1]


@given(dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]), cut=st.integers(0, 4))
def test_dtypes_are_kept_over_any_resume_point(tmp_path_factory, dtype, cut):
    folder = tmp_path_factory.mktemp("store")
    for part in (range(cut), range(cut, 4)):
        store = ActivationStore(folder, {"a": 1}, 4)
        store.begin(1)
        assert store.missing() == list(range(part.start, 4))
        for index in part:
            store.write(index, shard(index, dtype), NOTES)
    store.finish()
    features = store.read()[0]["features"]
    assert features.dtype == dtype
    assert torch.equal(features, torch.cat([shard(i, dtype)["features"] for i in range(4)]))


WRITER = """
import sys, time, torch
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from cosprobe.activations.store import ActivationStore
from tests.activations.test_store import NOTES, shard
store = ActivationStore(Path(sys.argv[1]), {"seed": 0}, 30)
store.begin(1000)
print("ready", flush=True)
for index in store.missing():
    store.write(index, shard(index), NOTES)
    time.sleep(0.01)
store.finish()
"""


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_from_there(tmp_path):
    folder, chance = tmp_path / "store", random.Random(3)
    for _ in range(4):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(folder), os.getcwd()], stdout=subprocess.PIPE)
        writer.stdout.readline()
        time.sleep(chance.uniform(0.0, 0.12))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        store = ActivationStore(folder, {"seed": 0}, 30)
        written = 30 - len(store.missing())
        if not store.complete:
            with pytest.raises(ValueError, match="half-written" if written else "half-written|missing"):
                ActivationStore.open(folder)
    subprocess.run([sys.executable, "-c", WRITER, str(folder), os.getcwd()], check=True, stdout=subprocess.PIPE)
    tensors, _ = ActivationStore.open(folder).read()
    assert torch.equal(tensors["features"], torch.cat([shard(i)["features"] for i in range(30)]))
    assert not list(folder.glob(".*"))


def test_files_of_others_are_left_in_the_folder(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / ".notes").write_text("mine")
    (tmp_path / "store" / ".cache").mkdir()
    filled(tmp_path / "store")
    assert (tmp_path / "store" / ".notes").read_text() == "mine"


def test_a_truncated_shard_is_named(tmp_path):
    store = filled(tmp_path / "store")
    path = tmp_path / "store" / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors.*damaged.*train\.py"):
        store.missing()
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors.*damaged.*train\.py"):
        store.read()


def test_a_flipped_bit_is_found(tmp_path):
    store = filled(tmp_path / "store")
    path = tmp_path / "store" / "shard-00002.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"shard-00002\.safetensors.*checksum.*train\.py"):
        store.read()


def test_a_foreign_shard_is_named(tmp_path):
    store = filled(tmp_path / "store")
    other = filled(tmp_path / "other", seed=1)
    foreign = (other.folder / "shard-00000.safetensors").read_bytes()
    (store.folder / "shard-00000.safetensors").write_bytes(foreign)
    with pytest.raises(
        ValueError, match=rf"shard-00000\.safetensors.*{store.fingerprint}.*{other.fingerprint}.*train\.py"
    ):
        store.missing()
    swapped = (store.folder / "shard-00001.safetensors").read_bytes()
    (store.folder / "shard-00000.safetensors").write_bytes(swapped)
    with pytest.raises(ValueError, match=r"shard-00000\.safetensors.*train\.py"):
        store.read()


def test_other_settings_in_the_same_folder_are_refused_by_name(tmp_path):
    filled(tmp_path / "store", steps=20)
    with pytest.raises(ValueError, match=r"run_dir.*\bsteps=20\b.*\bsteps=10\b"):
        ActivationStore(tmp_path / "store", {"seed": 0, "steps": 10}, 3).begin(10)


def test_missing_and_half_written_stores(tmp_path):
    with pytest.raises(ValueError, match=r"/none\b.*missing.*manifest\.json.*train\.py"):
        ActivationStore.open(tmp_path / "none")
    store = ActivationStore(tmp_path / "half", {}, 2)
    store.begin(10)
    store.write(0, shard(0), NOTES)
    with pytest.raises(ValueError, match=r"/half\b.*\[1\].*\b2\b"):
        store.finish()
    with pytest.raises(ValueError, match=r"/half\b.*half-written.*manifest\.json.*train\.py"):
        ActivationStore.open(tmp_path / "half")
    (tmp_path / "half" / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"/half/manifest\.json.*settings.*shards"):
        ActivationStore.open(tmp_path / "half")


def test_a_store_too_large_for_the_disk_is_refused_before_it_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"\b1000000\.0 GB.*GB.*store.*run_dir"):
        ActivationStore(tmp_path / "store", {}, 4).begin(10**15)
    assert not list((tmp_path / "store").glob("shard*"))
    assert not (tmp_path / "store" / "settings.json").exists()


def test_fingerprint_follows_the_settings_and_nothing_else(tmp_path):
    first = ActivationStore(tmp_path, {"a": 1, "b": [1, 2]}, 3)
    assert first.fingerprint == ActivationStore(tmp_path / "x", json.loads('{"b": [1, 2], "a": 1}'), 3).fingerprint
    assert first.fingerprint != ActivationStore(tmp_path, {"a": 1, "b": [2, 1]}, 3).fingerprint


def test_a_store_opens_from_a_text_and_prints_what_it_holds(tmp_path):
    store = filled(tmp_path / "store", shards=3, task={"problems": "<9>"})
    (store.folder / "shard-00001.safetensors").unlink()
    again = ActivationStore.open(str(tmp_path / "store"))
    assert again == store and "2 of 3 shards" in repr(again)
    page = again._repr_html_()
    assert "task.problems" in page and "&lt;9&gt;" in page and "<9>" not in page
