from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cosprobe.activations.pooling import COLUMNS, GRID, Pooling, box_masks, whole_frame

SIZE = (3, 4, 8)
BOXES = [[(0.0, 0.0, 0.5, 0.5), (0.5, 0.5, 1.0, 1.0)]] * 2


def tokens(seed=0, dtype=torch.float32):
    return torch.randn(2, 96, 5, generator=torch.Generator().manual_seed(seed)).to(dtype)


def poolings():
    return [
        Pooling("clip"),
        Pooling("frame"),
        Pooling("grid"),
        Pooling("region", boxes=BOXES),
        Pooling("region", True, BOXES),
    ]


def test_against_plain_indexing():
    x = tokens().unflatten(1, SIZE)
    clip, frame, grid, region, frames = (p(tokens(), SIZE) for p in poolings())
    torch.testing.assert_close(clip[:, 0, 0], x.mean((1, 2, 3)))
    torch.testing.assert_close(frame[:, :, 0], x.mean((2, 3)))
    torch.testing.assert_close(grid[:, 5, 0], x[:, :, 1:2, 2:4].mean((1, 2, 3)))  # r1c1 of 4 x 4
    torch.testing.assert_close(region[:, 0, 1], x[:, :, 2:, 4:].mean((1, 2, 3)))
    torch.testing.assert_close(frames[:, 3, 0], x[:, 2, :2, :4].mean((1, 2)))
    torch.testing.assert_close(frames[:, 0], region[:, 0])


def test_frames_apart_against_plain_indexing():
    """Every pooling keeps its spatial parts and all latent frames, whatever it then does to time."""
    x = tokens().unflatten(1, SIZE)  # sample frame row column channel
    clip, frame, grid, region, frames = (p.by_frame(tokens(), SIZE) for p in poolings())
    for whole in (clip, frame):
        torch.testing.assert_close(whole[:, :, 0], x.mean((2, 3)))
    cells = x.unflatten(2, (GRID, 1)).unflatten(4, (GRID, 2)).mean((3, 5)).flatten(2, 3)
    torch.testing.assert_close(grid, cells)
    assert torch.equal(region, frames)
    torch.testing.assert_close(region[:, :, 0], x[:, :, :2, :4].mean((2, 3)))
    torch.testing.assert_close(region[:, :, 1], x[:, :, 2:, 4:].mean((2, 3)))
    coarse = Pooling("grid", across=2)
    torch.testing.assert_close(coarse.by_frame(tokens(), SIZE)[:, :, 1], x[:, :, :2, 4:].mean((2, 3)))
    assert coarse.positions(SIZE) == ("r0c0", "r0c1", "r1c0", "r1c1")


@pytest.mark.parametrize("pooling", poolings())
def test_a_probe_reads_means_of_what_the_frames_hold(pooling):
    parts = pooling.by_frame(tokens(), SIZE)  # sample frame part channel
    found = pooling(tokens(), SIZE)  # sample position region channel
    whole = parts.mean(1)[:, :, None] if pooling.kind == "grid" else parts.mean(1, keepdim=True)
    expected = {"frame": parts, "region": torch.cat([whole, parts], 1) if pooling.frames else whole}
    torch.testing.assert_close(found, expected.get(pooling.kind, whole))


@pytest.mark.parametrize(
    ("channels", "across"), [(1, 4), (64, 4), (65, 3), (113, 3), (114, 2), (256, 2), (257, 1), (5120, 1)]
)
def test_the_whole_frame_is_as_fine_as_its_columns_allow(channels, across):
    pooling = whole_frame(channels)
    assert (pooling.kind, pooling.across) == ("grid", across)
    assert across == 1 or across**2 * channels <= COLUMNS
    assert across == GRID or (across + 1) ** 2 * channels > COLUMNS


@pytest.mark.parametrize("pooling", poolings())
def test_shapes_and_positions_agree(pooling):
    assert pooling(tokens(), SIZE).shape == (2, len(pooling.positions(SIZE)), pooling.regions, 5)


@pytest.mark.slow
@given(seed=st.integers(0, 99), scale=st.floats(-3, 3))
def test_linear_and_blind_to_the_order_inside_a_frame(seed, scale):
    a, b = tokens(seed), tokens(seed + 100)
    for pooling in poolings():
        torch.testing.assert_close(
            pooling(a + scale * b, SIZE), pooling(a, SIZE) + scale * pooling(b, SIZE), atol=1e-4, rtol=1e-4
        )
    order = torch.randperm(32, generator=torch.Generator().manual_seed(seed))
    shuffled = a.unflatten(1, (3, 32))[:, :, order].flatten(1, 2)
    torch.testing.assert_close(Pooling("frame")(shuffled, SIZE), Pooling("frame")(a, SIZE))


def test_sums_run_in_fp32():
    x = (1000 + tokens()).bfloat16()
    torch.testing.assert_close(Pooling("clip")(x, SIZE)[:, 0, 0], x.float().mean(1))


@pytest.mark.slow
@given(x=st.floats(0, 0.9), y=st.floats(0, 0.9), w=st.floats(0.001, 0.1))
def test_every_box_gets_a_token(x, y, w):
    assert box_masks([(x, y, x + w, y + w)], 4, 8).sum() >= 1


def test_grid_cells_share_the_tokens_out():
    masks = Pooling("grid").masks(1, 8, 8)
    assert masks.shape == (1, GRID * GRID, 64) and torch.equal(masks.sum(1), torch.ones(1, 64))


def test_errors():
    with pytest.raises(ValueError, match="96 tokens.*3 x 4 x 7"):
        Pooling("clip")(tokens(), (3, 4, 7))
    with pytest.raises(ValueError, match="96 tokens.*3 x 4 x 7"):
        whole_frame(5).by_frame(tokens(), (3, 4, 7))
    with pytest.raises(ValueError, match=r"boxes.*\b1\b.*\b2\b"):
        Pooling("region", boxes=BOXES[:1])(tokens(), SIZE)
    with pytest.raises(ValueError, match=r"probe\.pooling='region'.*regions"):
        Pooling("region", boxes=[BOXES[0], BOXES[0][:1]])


def test_tokens_are_kept_as_they_are():
    pooling, x = Pooling("token"), tokens()
    assert torch.equal(pooling(x, SIZE)[:, :, 0], x)
    names = pooling.positions(SIZE)
    assert len(names) == 96 and names[:2] == ("f0r0c0", "f0r0c1") and names[-1] == "f2r3c7"
    assert torch.equal(pooling(x, SIZE)[:, names.index("f1r2c5"), 0], x.unflatten(1, SIZE)[:, 1, 2, 5])
    assert torch.equal(pooling.by_frame(x, SIZE), x.unflatten(1, (3, 32)))
