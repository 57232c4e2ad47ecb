"""What a projection costs, against scikit-learn on both kinds of features; and a store with a projection."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from benchmarks.projection import costs
from cosprobe.activations.collection import UNPROJECTED, StoreSettings, store_bytes, unprojected_cells
from cosprobe.activations.dataset import ProbeSamples, load_samples, unprojected_samples
from cosprobe.activations.pooling import Pooling, random_projection
from cosprobe.activations.sampler import Sampler
from cosprobe.cells import Cell
from cosprobe.config import CaptureConfig, PipelineConfig
from cosprobe.errors import InputError
from cosprobe.evaluation.checks.projection import projection_cost
from cosprobe.tasks import MazeConfig, Target
from cosprobe.tasks.samples import draw_samples
from tests.examples.pipelines import save_wan, wan
from tests.examples.stores import collected

CHANNELS, KEPT, COUNT = 40, 4, 300
CELLS = (Cell(0, 1, "cond", "all"), Cell(0, 2, "cond", "all"))
TASK = MazeConfig(problems=20, frames=5)
PROBE = CaptureConfig(pooling="region", frames=True, project=6, random_weights=10)


def planted() -> ProbeSamples:
    """Two classes that one direction of 40 tells apart, in the second cell better than in the first."""
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=COUNT)
    features = rng.normal(size=(COUNT, 2, 1, CHANNELS))
    features[:, 0, 0, :4] += 0.4 * (2 * labels - 1)[:, None]
    features[:, 1, 0, :4] += 0.8 * (2 * labels - 1)[:, None]
    split = np.array(["train"] * 200 + ["validation"] * 40 + ["test"] * 60)
    keys, kinds = np.array([f"p{i}" for i in range(COUNT)]), np.array(["one"] * COUNT)
    target = Target("answer", 2, "problem", "answer", ("one",))
    return ProbeSamples(
        torch.from_numpy(features).float(), CELLS, (target,), {"answer": torch.from_numpy(labels)}, split, keys, kinds
    )


def by_sklearn(samples: ProbeSamples, cell: int, penalties: list[float]) -> np.ndarray:
    """Of every test sample, whether the fit that is best on validation is right."""
    rows = samples.features[:, cell, 0].double().numpy()
    labels, split = samples.labels["answer"].numpy(), samples.split
    train, validation, test = (split == name for name in ("train", "validation", "test"))
    rows = (rows - rows[train].mean(axis=0)) / rows[train].std(axis=0)
    fits = [
        LogisticRegression(C=2 / (penalty * train.sum()), tol=1e-10, max_iter=1000).fit(rows[train], labels[train])
        for penalty in penalties
    ]
    best = max(fits, key=lambda fit: fit.score(rows[validation], labels[validation]))
    return best.predict(rows[test]) == labels[test]


def test_the_cost_is_that_of_scikit_learn_at_the_better_cell():
    whole, penalties = planted(), [0.1]
    matrix = random_projection(CHANNELS, KEPT)
    samples = replace(whole, features=whole.features @ matrix)
    found = projection_cost(samples, whole, "answer", "all", penalties)
    assert found.cell == CELLS[1] and (found.channels, found.kept) == (CHANNELS, KEPT)
    right = by_sklearn(whole, 1, penalties), by_sklearn(samples, 1, penalties)
    assert found.whole.value == pytest.approx(right[0].mean()) and found.projected.value == right[1].mean()
    assert found.difference.value == pytest.approx(right[1].mean() - right[0].mean())
    assert found.difference.lower < found.difference.value < found.difference.upper < 0  # 4 of 40 channels lose much


def test_a_projection_that_keeps_the_signal_costs_nothing():
    whole = planted()
    samples = replace(whole, features=whole.features[..., :4])
    found = projection_cost(samples, whole, "answer", "all", [0.1, 1.0])
    assert found.difference.lower < 0 < found.difference.upper


def test_the_benchmark_projects_every_layer_at_the_step():
    whole = planted()
    each = costs(whole, "answer", CELLS[1], KEPT, [0.1])
    samples = replace(whole, features=whole.features @ random_projection(CHANNELS, KEPT))
    assert [one.cell for one in each] == list(CELLS)
    expected = projection_cost(samples, whole, "answer", "all", [0.1])
    assert (each[1].difference.value, each[1].cell) == (expected.difference.value, expected.cell)


def test_a_projection_keeps_norms_and_is_the_same_everywhere():
    matrix = random_projection(500, 300)
    assert torch.equal(matrix, random_projection(500, 300)) and set(matrix.abs().unique().tolist()) == {
        torch.tensor(300**-0.5).item()
    }
    assert matrix[:2, :4].sign().tolist() == [[1, -1, 1, 1], [-1, 1, -1, 1]]
    x = torch.randn(50, 500, generator=torch.Generator().manual_seed(0))
    ratio = (x @ matrix).norm(dim=1) / x.norm(dim=1)
    assert (ratio - 1).abs().max() < 0.2 and abs(float(ratio.mean()) - 1) < 0.03
    short = torch.ones(2, 3)
    assert Pooling("clip", project=3).projected(short) is short  # a latent has few channels


@pytest.mark.slow
def test_a_store_has_projected_features_and_a_few_with_all_channels(tmp_path):
    path = save_wan(tmp_path / "wan")
    config = PipelineConfig(path=str(path), steps=3, frames=5, batch=4)
    sampler, drawn = Sampler(wan(), config, TASK.build()), draw_samples(TASK.build(), TASK, 0)
    settings = [StoreSettings.of(config, TASK, probe, 0) for probe in (PROBE, replace(PROBE, project=0))]
    assert settings[0].identity != settings[1].identity and "project" not in settings[1].identity["probe"]
    stored, plain = (collected(sampler, drawn, one, tmp_path / name) for one, name in zip(settings, "ab", strict=True))
    samples, unprojected = load_samples(stored)[0], load_samples(plain)[0]
    matrix = random_projection(unprojected.features.shape[-1], 6)
    torch.testing.assert_close(samples.features[:], unprojected.features[:] @ matrix)

    whole = unprojected_samples(stored, samples)
    pairs = unprojected_cells(PROBE, sampler.depth, 3)
    assert pairs == [(0, 1), (0, 2), (1, 1), (1, 2)] and {(c.step, c.layer) for c in whole.cells} == set(pairs)
    at = [unprojected.cells.index(cell) for cell in whole.cells]
    assert torch.equal(whole.features[:], unprojected.features[:, at])
    assert unprojected_samples(plain, unprojected) is None

    tensors = stored.store.read()[0] | stored.store.read("untrained.")[0]
    kept = [v for name, v in tensors.items() if "features" in name or name == UNPROJECTED or name.startswith("input.")]
    size = sum(values.numel() * values.element_size() for values in kept) - tensors["input.prompt.whole"].numel() * 4
    assert size == store_bytes(sampler, PROBE, 20, 10)
    width = unprojected.features.shape[-1]
    with pytest.raises(InputError, match=rf"probe\.project={width}.*{width} channels"):
        store_bytes(sampler, replace(PROBE, project=width), 20)
