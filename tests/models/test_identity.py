"""A fingerprint is the content of everything that is loaded, and nothing else."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from cosprobe.config import PipelineConfig
from cosprobe.errors import InputError
from cosprobe.models.identity import fingerprint, model_fingerprint, pipeline_fingerprint
from cosprobe.models.loading import load_pipeline
from tests.examples.adapters import adapter
from tests.examples.pipelines import wan


def flip(path: Path, at: int = -5) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def files(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]


def test_a_bit_of_any_file_counts(copied):
    before = fingerprint(copied)
    assert len(files(copied)) >= 10
    for name in files(copied):
        flip(copied / name)
        assert fingerprint(copied) != before, name
        flip(copied / name)
        assert fingerprint(copied) == before, name


def test_a_bit_in_the_middle_of_large_weights_counts(tmp_path):
    (tmp_path / "transformer").mkdir()
    path = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(bytes(3 << 20))
    before = fingerprint(tmp_path)
    flip(path, 1_234_567)
    assert fingerprint(tmp_path) != before


def differing(one: dict[str, str], two: dict[str, str]) -> set[str]:
    """The parts in which two fingerprints differ."""
    return {part for part in {*one, *two} if one.get(part) != two.get(part)}


def test_the_part_that_differs_is_known(copied, tmp_path):
    before = fingerprint(copied)
    parts = {"transformer", "vae", "text_encoder", "tokenizer", "scheduler", "index"}
    assert parts <= set(before) and "adapters" not in before
    for name in files(copied):
        flip(copied / name)
        assert differing(before, fingerprint(copied)) == {"index" if "/" not in name else name.split("/")[0]}, name
        flip(copied / name)
    assert differing(before, fingerprint(copied, adapter(tmp_path / "adapter"))) == {"adapters"}


def test_the_place_and_what_is_not_loaded_do_not_count(copied, tmp_path):
    before = fingerprint(copied)
    assert fingerprint(shutil.copytree(copied, tmp_path / "moved" / "deeper")) == before
    (copied / "README.md").write_text("about")
    (copied / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"never read")
    (copied / ".cache").mkdir()
    (copied / ".cache" / "lock.json").write_text("{}")
    assert fingerprint(copied) == before


def test_links_are_followed_and_a_link_that_is_repointed_counts(copied, tmp_path):
    before = fingerprint(copied)
    for name in ("one", "two"):
        shutil.copytree(copied / "transformer", tmp_path / name)
    flip(next((tmp_path / "two").glob("*.safetensors")))
    shutil.rmtree(copied / "transformer")
    (copied / "transformer").symlink_to(tmp_path / "one")
    assert fingerprint(copied) == before
    (copied / "transformer").unlink()
    (copied / "transformer").symlink_to(tmp_path / "two")
    assert fingerprint(copied) != before
    os.symlink(copied, copied / "vae" / "loop")
    with pytest.raises(InputError, match="too deep"):
        fingerprint(copied)


def test_adapters_count_as_a_file_and_as_a_folder(copied, tmp_path):
    path = adapter(tmp_path / "adapter")
    bare = PipelineConfig(path=str(copied))
    file, folder = (model_fingerprint(PipelineConfig(path=str(copied), lora=str(p))) for p in (path, path.parent))
    assert file == folder and differing(file, model_fingerprint(bare)) == {"adapters"}
    flip(path)
    assert differing(file, model_fingerprint(PipelineConfig(path=str(copied), lora=str(path)))) == {"adapters"}


def test_what_is_no_model_has_no_fingerprint(tmp_path):
    with pytest.raises(InputError, match=r"pipeline\.path='.*/none'.*model_index\.json.*moved"):
        model_fingerprint(PipelineConfig(path=str(tmp_path / "none")))
    with pytest.raises(InputError, match=r"pipeline\.lora='.*/none'"):
        model_fingerprint(PipelineConfig(lora=str(tmp_path / "none")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"pipeline\.lora='.*/empty'"):
        model_fingerprint(PipelineConfig(lora=str(tmp_path / "empty")))


def test_a_loaded_pipeline_is_its_files_until_something_in_memory_changes(copied, tmp_path):
    path = adapter(tmp_path / "adapter")
    config = PipelineConfig(path=str(copied), lora=str(path))
    pipeline = load_pipeline(config)
    assert pipeline_fingerprint(pipeline) == model_fingerprint(config)
    again = load_pipeline(config)
    with torch.no_grad():
        again.transformer.blocks[0].ffn.net[2].weight.mul_(1.01)
    bare = PipelineConfig(path=config.path)
    assert differing(pipeline_fingerprint(again), model_fingerprint(config)) == {"transformer"}
    assert differing(pipeline_fingerprint(again), model_fingerprint(bare)) == {"transformer", "adapters"}
    pipeline.scheduler.register_to_config(shift=5.0)
    assert differing(pipeline_fingerprint(pipeline), model_fingerprint(config)) == {"scheduler"}


def test_without_files_every_value_in_memory_counts():
    here, same = wan(), wan()
    assert pipeline_fingerprint(here) == pipeline_fingerprint(same)
    with torch.no_grad():
        same.vae.decoder.conv_out.weight[0, 0, 0, 0, 0] += 1e-6
    assert differing(pipeline_fingerprint(here), pipeline_fingerprint(same)) == {"vae"}


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.transformer.blocks[1].ffn.net[2].weight.data.view(-1)[1:3].fill_(50.0),  # two values of hundreds
        lambda p: p.transformer.blocks[1].register_forward_hook(lambda module, inputs, output: 2 * output),
        lambda p: setattr(p.transformer.blocks[1], "forward", None),
        lambda p: p.scheduler.set_shift(40.0),
        lambda p: setattr(p.transformer.blocks[1].norm1, "eps", 1.0),
    ],
    ids=["two weights", "hook", "forward", "shift", "eps"],
)
def test_any_change_in_memory_makes_another_model(saved, change):
    config = PipelineConfig(path=str(saved))
    pipeline = load_pipeline(config)
    assert pipeline_fingerprint(pipeline) == model_fingerprint(config)
    change(pipeline)
    assert differing(pipeline_fingerprint(pipeline), model_fingerprint(config)) <= {"transformer", "scheduler"}
    assert pipeline_fingerprint(pipeline) != model_fingerprint(config)
