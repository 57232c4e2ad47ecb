"""Memory that was freed is used again; files are whole or absent; what a machine lacks is told as such."""

from __future__ import annotations

import errno
import platform
import subprocess
import sys

import pytest
import torch

from cosprobe.errors import InputError
from cosprobe.files import make_folder, whole_file
from cosprobe.runtime import enough_memory

PAGES = """
import resource, sys, torch
from cosprobe.command import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def faults():
    for _ in range(20):
        torch.ones(16 << 20).add_(1)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = faults()  # the first tensor is fresh either way
print(faults() - before)
"""


def _fresh_pages(how: str) -> int:
    return int(subprocess.run([sys.executable, "-c", PAGES, how], capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries are left as they are")
def test_freed_memory_is_handed_out_again():
    kept, given_back = _fresh_pages("kept"), _fresh_pages("default")
    print(f"fresh pages of 20 tensors of 64 MiB: {kept} kept, {given_back} given back")  # noqa: T201
    assert kept < 100 < given_back


def test_a_file_is_whole_or_absent(tmp_path):
    path = tmp_path / "figure.png"
    with whole_file(path) as part:
        part.write_text("new")
        assert part.suffix == ".png" and not path.exists()
    assert path.read_text() == "new"
    with pytest.raises(KeyError), whole_file(path) as part:
        part.write_text("half")
        raise KeyError
    assert [p.name for p in tmp_path.iterdir()] == ["figure.png"] and path.read_text() == "new"


def test_a_disk_that_refuses_is_told_with_its_path_and_reason(tmp_path):
    with pytest.raises(InputError, match=r"grid\.nc.*No space left"), whole_file(tmp_path / "grid.nc"):
        raise OSError(errno.ENOSPC, "No space left on device")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/inside"):
        make_folder(tmp_path / "file" / "inside")


@pytest.mark.parametrize("place", ["", "activations", "a/b", "vae/runs"])
def test_no_folder_is_made_in_that_of_a_model(tmp_path, place):
    """A model is known by everything in its folder, so it would become another."""
    (tmp_path / "wan" / "vae").mkdir(parents=True)
    (tmp_path / "wan" / "model_index.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=rf"^'.*/wan/?{place}'.*model.*'{tmp_path / 'wan'}'"):
        make_folder(tmp_path / "wan" / place)
    (tmp_path / "link").symlink_to(tmp_path / "wan")
    with pytest.raises(InputError, match=rf"'{tmp_path / 'wan'}'"):
        make_folder(tmp_path / "link" / place)
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "link", *before]
    assert make_folder(tmp_path / "beside").is_dir()


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA"), RuntimeError("[enforce fail] can't allocate memory")]
)
def test_too_little_memory_is_told_with_what_to_do(error):
    with pytest.raises(InputError, match=r"memory.*lower pipeline\.batch"), enough_memory("lower pipeline.batch"):
        raise error


def test_other_errors_of_torch_keep_their_class():
    with pytest.raises(RuntimeError, match="size of tensor"), enough_memory("lower pipeline.batch"):
        torch.zeros(2) + torch.zeros(3)
