from __future__ import annotations

import numpy as np
import pytest

from cosprobe.cache import cached

ARRAYS = {"a": np.arange(6).reshape(2, 3), "b": np.broadcast_to(np.array([0.5, np.nan]), (2, 2))}


@pytest.fixture
def calls():
    return []


@pytest.fixture
def compute(calls):
    def work():
        calls.append(len(calls))
        return ARRAYS, {"names": ["x", None]}

    return work


def test_a_result_is_computed_once_for_each_key(tmp_path, compute, calls, capsys):
    for key, expected in (({"seed": 0}, 1), ({"seed": 0}, 1), ({"seed": 1}, 2), ({"seed": 0}, 2)):
        arrays, notes = cached(tmp_path, "inputs", key, compute)
        assert len(calls) == expected and notes == {"names": ["x", None]}
        for name, values in ARRAYS.items():
            np.testing.assert_array_equal(arrays[name], values)
            assert arrays[name].dtype == values.dtype
    assert capsys.readouterr().out.count("re-using") == 2


@pytest.mark.parametrize("damage", ["one bit", "cut", "empty", "other code"])
def test_a_file_that_cannot_be_trusted_is_replaced(tmp_path, compute, calls, monkeypatch, damage):
    cached(tmp_path, "inputs", {}, compute)
    (path,) = tmp_path.glob("inputs-*.safetensors")
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    if damage == "other code":
        monkeypatch.setattr("cosprobe.cache.code_fingerprint", lambda: "other")
    else:
        path.write_bytes({"one bit": bytes(content), "cut": bytes(content[:-9]), "empty": b""}[damage])
    arrays, _ = cached(tmp_path, "inputs", {}, compute)
    assert len(calls) == 2
    np.testing.assert_array_equal(arrays["a"], ARRAYS["a"])
    cached(tmp_path, "inputs", {}, compute)
    assert len(calls) == 2
