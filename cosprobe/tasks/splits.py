"""Which split a problem belongs to: train, validation, calibration, test, or the training of the video model itself."""

from __future__ import annotations

import hashlib

# Share of canonical problems, in percent. Problems of the split `model` may be used to train a video model.
SPLITS = {"model": 50, "train": 20, "validation": 10, "calibration": 10, "test": 10}


def split_of(key: str) -> str:
    """The split of a canonical key. A hash assigns each key to one of 100 buckets, and SPLITS divides the buckets."""
    bucket = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % 100
    for split, share in SPLITS.items():
        if bucket < share:
            return split
        bucket -= share
    raise AssertionError("SPLITS must add up to 100")
