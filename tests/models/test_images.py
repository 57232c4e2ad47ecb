"""The same picture in every kind is the same tensor; a range, a shape or a size that is wrong is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from cosprobe.errors import InputError
from cosprobe.models.images import image_batch

PIXELS = np.random.default_rng(0).integers(0, 256, size=(3, 32, 16, 3)).astype(np.uint8)
EXPECTED = torch.from_numpy(PIXELS).permute(0, 3, 1, 2).float() / 255
KINDS = {
    "PIL": [Image.fromarray(p) for p in PIXELS],
    "uint8": list(PIXELS),
    "float64": [p / 255 for p in PIXELS],
    "batch": PIXELS,
    "float batch": PIXELS.astype(np.float32) / 255,
    "tensors": [torch.from_numpy(p).permute(2, 0, 1) for p in PIXELS],
    "float tensors": list(EXPECTED),
    "tensor batch": EXPECTED,
    "mixed": (Image.fromarray(PIXELS[0]), PIXELS[1], EXPECTED[2]),
    "half": EXPECTED.double(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_the_same_tensor(kind):
    found = image_batch(KINDS[kind])
    assert found.dtype == torch.float32 and found.shape == EXPECTED.shape
    torch.testing.assert_close(found, EXPECTED, rtol=0, atol=1e-7)


def test_one_image_is_a_batch_of_one():
    for one in (KINDS["PIL"][0], PIXELS[0], EXPECTED[0], EXPECTED[:1]):
        torch.testing.assert_close(image_batch(one), EXPECTED[:1], rtol=0, atol=1e-7)


def test_grey_and_transparent_pictures_become_rgb():
    grey = image_batch(Image.fromarray(PIXELS[0]).convert("L"))
    assert torch.equal(grey[:, 0], grey[:, 1]) and grey.shape == (1, 3, 32, 16)
    assert image_batch(Image.fromarray(PIXELS[0]).convert("RGBA")).shape == (1, 3, 32, 16)


def test_the_caller_keeps_its_array():
    mine = PIXELS.astype(np.float32) / 255
    image_batch(mine)[:] = 0
    assert mine.max() == 1


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], r"^images: none"),
        (PIXELS.astype(np.float32), r"^images: values from 0 to 255, expected floats from 0 to 1; divide by 255"),
        ([EXPECTED[0], EXPECTED[1] * 255], r"^images\[1\]: values from 0 to 255.*divide by 255"),
        (EXPECTED * 2 - 1, r"^images: values from -1 to 1.*\(x \+ 1\) / 2"),
        (EXPECTED * 300 - 20, r"^images: values from -20 to 280.*divide by 255"),
        (EXPECTED * np.nan, r"^images: NaN or infinite"),
        (PIXELS.astype(int), r"^images: type torch.int64, expected uint8"),
        (PIXELS > 4, r"^images: type torch.bool, expected uint8"),
        (PIXELS[0, :, :, 0], r"^images: shape \[32, 16\], expected \[height, width, 3\]"),
        (
            EXPECTED.permute(0, 2, 3, 1),
            r"^images: shape \[3, 32, 16, 3\], expected \[3, height.*channels first",
        ),
        (PIXELS.transpose(0, 3, 1, 2), r"^images: shape \[3, 3, 32, 16\], expected .*channels last"),
        ([PIXELS[0], PIXELS[1, :16]], r"^images\[1\]: 16 x 16 pixels, and images\[0\] has 32 x 16.*resize"),
        (["picture.png"], r"^images\[0\]: str, expected a PIL image"),
    ],
)
def test_what_is_no_picture_is_refused(images, message):
    with pytest.raises(InputError, match=message) as caught:
        image_batch(images)
    assert "\n" not in str(caught.value)
