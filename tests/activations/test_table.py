from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cosprobe.activations.table import SampleTable
from cosprobe.errors import InputError
from cosprobe.tasks import MazeConfig, SelectConfig
from cosprobe.tasks.samples import draw_samples


@pytest.mark.parametrize("config", [MazeConfig(problems=20, seeds=2), SelectConfig(problems=20)])
def test_a_table_is_read_as_it_was_written(config, tmp_path):
    task = config.build()
    drawn = draw_samples(task, config, 0)
    table = SampleTable.of(task, drawn, {"problems": 20})
    again = SampleTable.load(table.save(tmp_path))
    assert (again.request, again.names, again.targets, again.kinds) == (
        table.request, table.names, task.targets, task.kinds,
    )  # fmt: skip
    assert list(again.columns) == list(table.columns)  # the order of confounds is that of their columns as an input
    assert all(torch.equal(values, again.columns[name]) for name, values in table.columns.items())
    assert len(set(table.names)) == len(drawn) and table.names[0] == drawn[0].name
    assert SampleTable.largest(tmp_path).names == table.names


def test_a_problem_without_a_label_has_minus_one():
    config = MazeConfig(problems=20)
    drawn = draw_samples(config.build(), config, 0)
    columns = SampleTable.of(config.build(), drawn, {}).columns
    for i, sample in enumerate(drawn):
        assert columns["label.answer"][i] == (sample.problem.answer if sample.problem.kind == "one_exit" else -1)
        assert columns["label.corridors"][i].tolist() == list(sample.problem.labels["corridors"])
    assert "label.model_answer" not in columns


def test_other_targets_or_numbers_of_problems_are_other_tables(tmp_path):
    config = MazeConfig(problems=20)
    task, drawn = config.build(), draw_samples(config.build(), config, 0)
    table = SampleTable.of(task, drawn, {"problems": 20})
    others = [replace(table, request={"problems": 21}), replace(table, targets=table.targets[1:])]
    assert len({one.save(tmp_path) for one in (table, *others)}) == 3
    small = replace(table, request={"problems": 2}, names=table.names[:2], columns={})
    small.save(tmp_path)
    assert len(SampleTable.largest(tmp_path).names) == 20


def test_a_damaged_or_missing_table_is_named(tmp_path):
    with pytest.raises(InputError, match=rf"{tmp_path.name}.*samples-.*train\.py"):
        SampleTable.largest(tmp_path)
    config = MazeConfig(problems=20)
    path = SampleTable.of(config.build(), draw_samples(config.build(), config, 0), {}).save(tmp_path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match=rf"{path.name}.*damaged"):
        SampleTable.load(path)


def test_a_store_of_several_sets_is_not_guessed_at(tmp_path):
    config = MazeConfig(problems=40)
    table = SampleTable.of(config.build(), draw_samples(config.build(), config, 0), {})
    for i, part in enumerate((slice(0, 20), slice(20, 40))):
        columns = {name: values[part] for name, values in table.columns.items()}
        replace(table, request={"part": i}, names=table.names[part], columns=columns).save(tmp_path)
    with pytest.raises(InputError, match="several sets.*run folder"):
        SampleTable.largest(tmp_path)
    table.save(tmp_path)
    assert SampleTable.largest(tmp_path).names == table.names
