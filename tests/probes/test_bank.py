from __future__ import annotations

import json
import re
from dataclasses import asdict, replace

import pytest
import torch

from cosprobe.activations.collection import StoreSettings
from cosprobe.cells import Cell
from cosprobe.config import CaptureConfig, PipelineConfig, ProbeConfig, TrainerConfig
from cosprobe.probes.bank import FORMAT, ProbeBank, Provenance, kept_bank, load_probes
from cosprobe.probes.linalg import affine, classes_last
from cosprobe.tasks import Target
from cosprobe.tasks.task import readable_targets

REGIONS, CHANNELS = 3, 4
CELLS = tuple(Cell(step, layer, "cond", "all") for step in range(2) for layer in range(2))
TARGETS = (
    Target("answer", 3, "candidate", "answer", ("one",)),
    Target("doors", 2, "region", "perception", ("one", "two")),
    Target("start", 5, "problem", "perception", ("one",)),
)
PROVENANCE = Provenance(
    store=StoreSettings(
        {"index": "tiny"}, 3, PipelineConfig(steps=2), {"frames": 5}, CaptureConfig(steps="last"), {"torch": "2"}
    ),
    probe={"kind": "newton", "penalties": [0.1]},
    trainer={"devices": 1},
    seed=3,
    train=12,
    validation=4,
    converged={"answer": (4, 4), "doors": (3, 4)},
    gap={"answer": 1e-9},
    policies=({"target": "answer", "threshold": 0.7},),
)


@pytest.fixture
def bank() -> ProbeBank:
    rng = torch.Generator().manual_seed(1)
    shapes = {"answer": (CHANNELS, 1), "doors": (CHANNELS, 2), "start": (REGIONS * CHANNELS, 5)}
    return ProbeBank(
        CELLS,
        TARGETS,
        REGIONS,
        mean=torch.randn(4, CHANNELS, generator=rng),
        std=torch.rand(4, CHANNELS, generator=rng) + 0.5,
        weights={name: torch.randn(4, *shape, generator=rng) for name, shape in shapes.items()},
        biases={name: torch.randn(4, shape[1], generator=rng) for name, shape in shapes.items()},
        penalties={name: torch.full((4,), 0.1) for name in shapes},
        provenance=PROVENANCE,
    )


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(7, 4, REGIONS, CHANNELS, generator=torch.Generator().manual_seed(2))


def test_decision_is_the_scalar_definition_of_each_form(bank, features):
    n, c, r = 2, 3, 1
    x = (features[n, c] - bank.mean[c]) / bank.std[c]
    answer, doors, start = (bank.decision(features, t.name) for t in TARGETS)
    assert answer.shape == (4, 7, REGIONS)
    assert doors.shape == (4, 7, REGIONS, 2)
    assert start.shape == (4, 7, 5)
    close = {"atol": 1e-5}
    assert torch.allclose(answer[c, n], x @ bank.weights["answer"][c][:, 0] + bank.biases["answer"][c], **close)
    assert torch.allclose(doors[c, n, r], x[r] @ bank.weights["doors"][c] + bank.biases["doors"][c], **close)
    assert torch.allclose(start[c, n], x.flatten() @ bank.weights["start"][c] + bank.biases["start"][c], **close)


def test_penalties_stay_between_samples_and_classes(bank, features):
    rows = features.transpose(0, 1)
    weight = torch.stack([bank.weights["doors"], 2 * bank.weights["doors"]], dim=2)
    bias = torch.stack([bank.biases["doors"], 2 * bank.biases["doors"]], dim=1)
    both = classes_last(affine(rows, weight, bias), "region")
    one = classes_last(affine(rows, bank.weights["doors"], bank.biases["doors"]), "region")
    assert both.shape == (4, 7, REGIONS, 2, 2)
    assert torch.allclose(both[..., 1, :], 2 * one, atol=1e-5)


def test_predictions_are_the_most_probable_labels(bank, features):
    probabilities = bank.probabilities(features, "doors")
    assert torch.allclose(probabilities.sum(-1), torch.ones(4, 7, REGIONS))
    assert torch.equal(bank.predict(features, "doors"), probabilities.argmax(-1))


def test_a_bank_read_in_parts_is_the_whole_bank(bank, features, monkeypatch):
    whole = bank.decision(features, "start")
    monkeypatch.setattr("cosprobe.probes.linalg.CHUNK", features[:, 0].numel())
    assert torch.allclose(bank.decision(features, "start"), whole, atol=1e-6)


def test_selected_cells_decide_as_in_the_whole_bank(bank, features):
    some = (CELLS[3], CELLS[1])
    expected = bank.decision(features, "answer")[[3, 1]]
    assert torch.equal(bank.select(some).decision(features[:, [3, 1]], "answer"), expected)
    assert torch.equal(bank.decision(features[:, [3, 1]], "answer", some), expected)
    with pytest.raises(ValueError, match=f"{re.escape(str(Cell(9, 0, 'cond', 'all')))}.*4 cells"):
        bank.select([Cell(9, 0, "cond", "all")])


def test_joined_parts_are_the_bank(bank, features):
    joined = ProbeBank.join([bank.select(CELLS[:1]), bank.select(CELLS[1:])])
    assert joined.cells == CELLS
    assert torch.equal(joined.decision(features, "start"), bank.decision(features, "start"))


def test_features_of_another_shape_are_refused(bank, features):
    with pytest.raises(ValueError, match=r"features\[7, 3, 3, 4\].*\[4, 3, 4\]"):
        bank.decision(features[:, :3], "answer")


def test_an_unknown_target_is_refused_with_the_known_ones(bank, features):
    with pytest.raises(ValueError, match="target='anwser'.*answer, doors, start"):
        bank.predict(features, "anwser")


def test_without_regions_candidates_are_classes_and_region_targets_do_not_exist():
    read = readable_targets(TARGETS, 1)
    assert [(t.name, t.form) for t in read] == [("answer", "problem"), ("start", "problem")]
    assert readable_targets(TARGETS, 2) == TARGETS


def test_a_bank_survives_the_disk(bank, features, tmp_path):
    bank.save(tmp_path / "run" / "probes")
    for path in (tmp_path / "run", tmp_path / "run" / "probes"):
        loaded = load_probes(path)
        assert (loaded.cells, loaded.targets, loaded.regions) == (bank.cells, bank.targets, bank.regions)
        assert loaded.provenance == PROVENANCE
        assert torch.equal(loaded.penalties["start"], bank.penalties["start"])
        assert torch.equal(loaded.decision(features, "start"), bank.decision(features, "start"))
    assert sorted(p.name for p in (tmp_path / "run" / "probes").iterdir()) == ["bank.json", "bank.safetensors"]


def test_a_missing_bank_is_named(tmp_path):
    with pytest.raises(ValueError, match=rf"{tmp_path}.*bank\.json.*missing"):
        load_probes(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "bank.safetensors").unlink(), r"bank\.safetensors.*missing"),
        (lambda d: (d / "bank.safetensors").write_bytes(b"half"), r"bank\.safetensors.*damaged.*bank\.json"),
        (lambda d: (d / "bank.json").write_text('{"format": 1,'), r"bank\.json"),
        (lambda d: (d / "bank.json").write_text("[]"), r"bank\.json"),
    ],
)
def test_damage_is_found_and_named(bank, tmp_path, damage, message):
    bank.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_probes(tmp_path)


def test_tensors_of_another_fit_are_found(bank, tmp_path):
    bank.save(tmp_path / "a")
    replace(bank, mean=bank.mean + 1).save(tmp_path / "b")
    (tmp_path / "a" / "bank.safetensors").write_bytes((tmp_path / "b" / "bank.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"bank\.safetensors.*another fit"):
        load_probes(tmp_path / "a")


def test_another_format_is_refused(bank, tmp_path):
    bank.save(tmp_path)
    description = json.loads((tmp_path / "bank.json").read_text())
    (tmp_path / "bank.json").write_text(json.dumps(description | {"format": 99}))
    with pytest.raises(ValueError, match=rf"format 99\b.*\b{FORMAT}\b"):
        load_probes(tmp_path)


def test_a_bank_is_kept_for_its_own_settings_with_its_policies(bank, tmp_path):
    store = StoreSettings({"index": "model"}, 3, PipelineConfig(), {"problems": 9}, CaptureConfig(), {})
    probe, trainer = ProbeConfig(kind="ridge"), TrainerConfig()
    assert kept_bank(tmp_path, store, probe, trainer, 3) is None
    policies = ({"threshold": 0.9},)
    made = bank.with_provenance(store=store, probe=asdict(probe), trainer=asdict(trainer), seed=3, policies=policies)
    made.save(tmp_path)
    kept = kept_bank(tmp_path, store, probe, replace(trainer, devices="2", accelerator="cpu"), 3)
    assert kept is not None and kept.provenance.policies == policies
    for others in (
        (replace(store, seed=4), probe, trainer, 3),
        (store, replace(probe, penalties=[1.0]), trainer, 3),
        (store, probe, replace(trainer, precision="bf16-mixed"), 3),
        (store, probe, trainer, 4),
    ):
        assert kept_bank(tmp_path, *others) is None
    (tmp_path / "bank.safetensors").write_bytes(b"damaged")
    assert kept_bank(tmp_path, store, probe, trainer, 3) is None


def test_a_bank_prints_its_cells_and_targets(bank):
    text = repr(bank)
    assert len(text) < 1000 and f"{len(bank.cells)} cells" in text
    assert all(f"{target.name} ({target.classes} classes)" in text for target in bank.targets)
