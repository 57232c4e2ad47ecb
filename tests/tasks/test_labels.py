"""Labels become classes in a fixed order, whatever they come in; what is no label is named."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from cosprobe.errors import InputError
from cosprobe.tasks.labels import encode_labels


@pytest.mark.parametrize(
    ("values", "names", "classes"),
    [
        (["red", "blue", "red"], ("blue", "red"), [1, 0, 1]),
        (np.array(["red", "blue", "red"]), ("blue", "red"), [1, 0, 1]),
        (pd.Series(["red", "blue", "red"]), ("blue", "red"), [1, 0, 1]),
        ([10, 9, -1], ("-1", "9", "10"), [2, 1, 0]),  # as numbers, not as texts
        (np.array([10, 9, -1], dtype=np.int8), ("-1", "9", "10"), [2, 1, 0]),
        (torch.tensor([10, 9, -1]), ("-1", "9", "10"), [2, 1, 0]),
        ([2.0, 1.0, 2.0], ("1", "2"), [1, 0, 1]),  # what pandas makes of whole numbers
        ([True, False, True], ("False", "True"), [1, 0, 1]),
    ],
)
def test_classes_are_sorted(values, names, classes):
    found, index = encode_labels("colour", values, 3, "image")
    assert found == names and index.tolist() == classes and index.dtype == np.int64


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["red", "blue"], r"2 entries, expected 3, one for each image"),
        ("red", r"'red', expected a list with one class for each image"),
        (["red", "red", "red"], r"one class only, 'red'; expected at least 2 classes"),
        (["red", None, "blue"], r"None at index 1, expected a class for each image"),
        (["red", float("nan"), "blue"], r"nan at index 1"),
        (np.array([0, 1, np.nan]), r"nan at index 2"),
        (pd.Series([0, None, 1]), r"nan at index 1"),
        ([0.5, 1.0, 2.0], r"0\.5 at index 0, expected class names or whole numbers"),
        (np.eye(3), r"\[1\.0, 0\.0, 0\.0\] at index 0, expected class names"),
        (["red", 1, "blue"], r"both texts and numbers"),
    ],
)
def test_what_is_no_label_is_refused(values, message):
    with pytest.raises(InputError, match=rf"^labels 'colour': {message}") as caught:
        encode_labels("colour", values, 3, "image")
    assert "\n" not in str(caught.value)
