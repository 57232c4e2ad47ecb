"""What is loaded is complete, fits its configuration and is finite; anything else is refused with its name."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.pipeline_loading_utils import simple_get_class_obj
from safetensors.torch import load_file, save_file

from cosprobe.config import PipelineConfig
from cosprobe.errors import InputError
from cosprobe.minimodel.encoding import TEXT_WIDTH
from cosprobe.models.loading import load_pipeline
from tests.examples.adapters import FILE, adapter
from tests.examples.pipelines import save_wan


def change(folder: Path, part: str, edit) -> None:
    """Changes the tensors of a part. edit: changes a dict of tensors."""
    path = next((folder / part).glob("*.safetensors"))
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})


def configure(folder: Path, part: str, **values) -> None:
    path = folder / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(folder: Path, message: str, **settings) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_pipeline(PipelineConfig(path=str(folder), **settings))
    assert "\n" not in str(caught.value)


NAMES = {  # a tensor of every model
    "transformer": "blocks.1.attn1.to_q.weight",
    "vae": "decoder.conv_in.weight",
    "text_encoder": "encoder.block.0.layer.0.SelfAttention.q.weight",
}


@pytest.mark.parametrize("part", NAMES)
def test_a_tensor_that_is_missing_is_named(copied, part):
    change(copied, part, lambda tensors: tensors.pop(NAMES[part]))
    refused(copied, rf"pipeline\.path=.*{part}: {NAMES[part]} are not in its files")


@pytest.mark.parametrize("part", NAMES)
def test_a_tensor_of_no_layer_is_named(copied, part):
    change(copied, part, lambda tensors: tensors.update({"extra.weight": torch.ones(2)}))
    refused(copied, rf"pipeline\.path=.*{part}: extra\.weight are in its files but not in the model")


@pytest.mark.parametrize("part", NAMES)
def test_a_tensor_of_another_shape_is_named(copied, part):
    change(copied, part, lambda tensors: tensors.update({NAMES[part]: tensors[NAMES[part]][:-1].clone()}))
    refused(copied, rf"pipeline\.path=.*{NAMES[part]}")


@pytest.mark.parametrize("part", NAMES)
def test_a_value_that_is_not_finite_is_named(copied, part):
    change(copied, part, lambda tensors: tensors[NAMES[part]].view(-1)[3:4].fill_(float("nan")))
    refused(copied, rf"pipeline\.path=.*{part}: {NAMES[part]} has NaN")


class Listening(logging.Handler):
    """Keeps what transformers and diffusers print."""

    def __init__(self):
        super().__init__()
        self.said: list[str] = []

    def emit(self, record):
        self.said.append(record.getMessage())


@pytest.fixture
def listening():
    handler, loggers = Listening(), [logging.getLogger(name) for name in ("transformers", "diffusers")]
    for logger in loggers:
        logger.addHandler(handler)
    yield handler
    for logger in loggers:
        logger.removeHandler(handler)


@pytest.mark.parametrize("part", NAMES)
def test_the_error_is_all_that_is_said_and_later_reports_are_printed(copied, part, listening):
    def edit(tensors):
        tensors.pop(NAMES[part])
        tensors["extra.weight"] = torch.ones(2)

    change(copied, part, edit)
    refused(copied, rf"{part}: {NAMES[part]} are not in its files")
    assert not listening.said
    index = json.loads((copied / "model_index.json").read_text())
    simple_get_class_obj(*index[part]).from_pretrained(copied / part)  # not by us
    assert any("extra.weight" in line for line in listening.said)


def test_a_text_encoder_with_another_shape_is_told_by_its_name_alone(copied):
    change(copied, "text_encoder", lambda t: t.update({NAMES["text_encoder"]: t[NAMES["text_encoder"]][:-1].clone()}))
    refused(copied, rf"text_encoder: {NAMES['text_encoder']} have other shapes")


def test_a_configuration_of_fewer_layers_than_there_are_weights_is_refused(copied):
    configure(copied, "transformer", num_layers=2)
    refused(
        copied, r"transformer: blocks\.2\.\S+, blocks\.2\.\S+, blocks\.2\.\S+ and \d+ more tensors are in its files"
    )


def test_a_configuration_of_more_layers_than_there_are_weights_is_refused(copied):
    configure(copied, "transformer", num_layers=4)
    refused(copied, r"transformer: blocks\.3\..*not in its files")


def test_adapters_that_fit_change_the_model(copied, tmp_path):
    path = adapter(tmp_path / "adapter")
    bare, adapted = (load_pipeline(PipelineConfig(path=str(copied), lora=lora)) for lora in ("", str(path)))
    inputs = torch.randn(1, 12, 2, 4, 4), torch.tensor([500.0]), torch.randn(1, 32, 64)
    with torch.no_grad():
        before, after = (p.transformer(*inputs, return_dict=False)[0] for p in (bare, adapted))
    assert (before - after).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"prefix": "model.transformer."}, r"blocks\.0"),  # nothing fits
        ({"prefix": ""}, r"blocks\.0"),
        ({"layers": ("attn1.to_q", "attn1.to_z")}, r"attn1\.to_z"),  # a part fits
        ({"layers": ("attn1.to_z",)}, r"attn1\.to_z"),
    ],
)
def test_adapters_of_which_a_tensor_fits_no_layer_are_refused(copied, tmp_path, settings, named):
    path = adapter(tmp_path / "adapter", **settings)
    refused(copied, rf"pipeline\.lora='.*{named}", lora=str(path))


def test_adapters_that_are_not_finite_are_refused(copied, tmp_path):
    path = adapter(tmp_path / "adapter")
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = float("inf")
    save_file(tensors, path, {"format": "pt"})
    refused(copied, r"lora_A.*has NaN or infinite", lora=str(path))


@pytest.mark.parametrize("name", ["model_index.json", "transformer/config.json", "scheduler/scheduler_config.json",
                                  "tokenizer/tokenizer.json", "text_encoder/config.json"])  # fmt: skip
@pytest.mark.parametrize("content", [b"", b"[]", b"\x00\xff\xfe", b'{"a": 1}'])
def test_a_damaged_file_ends_in_one_line(copied, name, content):
    (copied / name).write_bytes(content)
    refused(copied, r"pipeline\.path=")


def test_a_part_that_is_missing_is_named(copied):
    shutil.rmtree(copied / "vae")
    refused(copied, r"pipeline\.path=.*vae/ is missing")


def deltas(config: PipelineConfig) -> dict[str, bool]:
    """Of every transformer of the loaded model, whether adapters change its output."""
    with_adapters = load_pipeline(config)
    bare = load_pipeline(PipelineConfig(path=config.path))
    found = {}
    for name in ("transformer", "transformer_2"):
        one, two = getattr(with_adapters, name), getattr(bare, name)
        if two is None:
            continue
        given = {"hidden_states": torch.ones(1, 12, 2, 4, 4), "timestep": torch.ones(1)}
        given |= {"encoder_hidden_states": torch.ones(1, 32, TEXT_WIDTH), "return_dict": False}
        found[name] = not torch.equal(one(**given)[0], two(**given)[0])
    return found


def test_each_expert_gets_its_own_adapters(tmp_path):
    path = str(save_wan(tmp_path / "wan", experts=2))
    high, low = (adapter(tmp_path / name) for name in ("high", "low"))
    both = deltas(PipelineConfig(path=path, lora=str(high), lora_2=str(low)))
    assert both == {"transformer": True, "transformer_2": True}
    assert deltas(PipelineConfig(path=path, lora_2=str(low))) == {"transformer": False, "transformer_2": True}
    with pytest.raises(InputError, match=r"pipeline\.lora_2.*two transformers"):
        load_pipeline(PipelineConfig(path=path, lora=str(high)))


def test_adapters_for_a_second_transformer_that_is_not_there_are_refused(copied, tmp_path):
    with pytest.raises(InputError, match=r"pipeline\.lora_2=.*one transformer"):
        load_pipeline(PipelineConfig(path=str(copied), lora_2=str(adapter(tmp_path / "low"))))


def test_names_of_diffsynth_are_those_of_diffusers(copied, tmp_path):
    """DiffSynth, which VBVR publishes its adapters with, has names of its own for the same layers."""
    plain = adapter(tmp_path / "plain")
    renamed = {"attn1.to_q": "self_attn.q", "ffn.net.2": "ffn.2"}
    tensors = {}
    for name, value in load_file(plain).items():
        for ours, theirs in renamed.items():
            name = name.replace(ours, theirs)
        tensors[name.removeprefix("transformer.").replace(".weight", ".default.weight")] = value
    assert "blocks.0.self_attn.q.lora_A.default.weight" in tensors
    (tmp_path / "diffsynth").mkdir()
    save_file(tensors, tmp_path / "diffsynth" / "low_noise_lora.safetensors")
    one, two = (
        load_pipeline(PipelineConfig(path=str(copied), lora=str(path))).transformer.state_dict()
        for path in (plain, tmp_path / "diffsynth")
    )
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


def test_a_folder_with_several_files_of_adapters_is_refused(copied, tmp_path):
    adapter(tmp_path / "two")
    (tmp_path / "two" / "other.safetensors").write_bytes((tmp_path / "two" / FILE).read_bytes())
    with pytest.raises(InputError, match=r"pipeline\.lora=.*2 safetensors files"):
        load_pipeline(PipelineConfig(path=str(copied), lora=str(tmp_path / "two")))
