"""Arranged models against diffusers' own: the same outputs, the same gradients."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention

from cosprobe.config import PipelineConfig
from cosprobe.models.cpu_layout import arrange
from cosprobe.models.loading import load_pipeline
from tests.examples.pipelines import save_wan

RELATIVE = 1e-5  # of the largest entry: rounding through every block, nothing more


def transformer() -> WanTransformer3DModel:
    torch.manual_seed(3)
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=6, out_channels=4, text_dim=8, freq_dim=16,
        ffn_dim=96, num_layers=4, patch_size=(1, 2, 2), rope_max_seq_len=16,
    )  # fmt: skip


def inputs(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {
        "hidden_states": torch.randn(2, 6, 3, 8, 4),
        "timestep": torch.tensor([300, 900]),
        "encoder_hidden_states": torch.randn(2, 5, 8),
    }


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return bool((ours - theirs).abs().max() <= RELATIVE * theirs.abs().max())


def test_outputs_and_gradients_are_those_of_diffusers():
    model, given = transformer(), inputs()
    expected = model(**given).sample
    expected.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    arrange(model)
    for _ in range(2):  # nothing is left over from one call to the next
        found = model(**given).sample
    assert close(found, expected)
    found.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert close(parameter.grad, gradients[name]), name


def test_without_gradients_outputs_are_the_same_bits_as_with_them():
    """Then operations are in place. Only tensors that they have made themselves are overwritten."""
    model, given = transformer(), inputs()
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.RMSNorm)):
        torch.nn.init.normal_(norm.weight)
    with torch.no_grad():
        expected = model(**given).sample
    arrange(model)
    with_gradients = model(**given).sample
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    parts = [m for m in model.modules() if isinstance(m, torch.nn.RMSNorm | torch.nn.Linear)]
    hooks = [m.register_forward_pre_hook(lambda _, x: seen.append((x[0], x[0].clone()))) for m in parts]
    with torch.no_grad():
        found = model(**given).sample
    for hook in hooks:
        hook.remove()
    assert close(found, expected) and torch.equal(found, with_gradients)
    assert len(seen) == len(parts) and all(torch.equal(now, then) for now, then in seen)


def test_the_norm_of_queries_has_the_bits_of_torch():
    norm, x = torch.nn.RMSNorm(48, eps=1e-6), torch.randn(3, 7, 48, generator=torch.Generator().manual_seed(1))
    torch.nn.init.normal_(norm.weight)
    for _ in range(2):
        with torch.no_grad():
            before, expected = x.clone(), torch.nn.functional.rms_norm(x, (48,), norm.weight, 1e-6)
            arrange(norm)
            assert torch.equal(norm(x), expected) and torch.equal(x, before)


@pytest.mark.parametrize("how", ["fused", "half"])
def test_other_ways_to_run_a_model_are_left_to_diffusers(how):
    ours, theirs, given = transformer(), transformer(), inputs(1)
    arrange(ours)
    if how == "fused":
        ours.fuse_qkv_projections(), theirs.fuse_qkv_projections()
    else:
        ours, theirs = ours.bfloat16(), theirs.bfloat16()
        given = {name: v.bfloat16() if v.is_floating_point() else v for name, v in given.items()}
    with torch.no_grad():
        found, expected = ours(**given).sample.float(), theirs(**given).sample.float()
    assert close(found, expected) or (how == "half" and (found - expected).abs().max() < 0.02 * expected.abs().max())


def autoencoder() -> AutoencoderKLWan:
    torch.manual_seed(4)
    model = AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[True, True]
    )
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.normal_(parameter)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_videos_are_coded_as_diffusers_does(dtype):
    ours, theirs = autoencoder().to(dtype), autoencoder().to(dtype)
    arrange(ours)
    torch.manual_seed(5)
    video = torch.randn(2, 3, 9, 16, 24, dtype=dtype)
    with torch.no_grad():
        found, expected = (model.encode(video).latent_dist.mode() for model in (ours, theirs))
        assert expected.abs().max() > 0.1
        tolerance = RELATIVE if dtype == torch.float32 else 0.02
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()
        for length in (1, 3):
            found, expected = (model.decode(latents(length, dtype)).sample for model in (ours, theirs))
            assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def latents(length: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(2, 4, length, 4, 6, generator=torch.Generator().manual_seed(length)).to(dtype)


def test_positions_matter_in_both():
    """Frames swapped in the input are not frames swapped in the output: the rotation is there."""
    model, given = transformer(), inputs(2)
    arrange(model)
    swapped = given | {"hidden_states": given["hidden_states"].flip(2)}
    with torch.no_grad():
        assert not torch.allclose(model(**given).sample.flip(2), model(**swapped).sample, atol=1e-3)


def test_a_loaded_pipeline_is_arranged(tmp_path):
    save_wan(tmp_path / "wan")
    loaded = load_pipeline(PipelineConfig(path=str(tmp_path / "wan")))
    attention = [m for m in loaded.transformer.modules() if isinstance(m, WanAttention)]
    assert [len(m._forward_pre_hooks) for m in attention] == [1, 0] * (len(attention) // 2)
