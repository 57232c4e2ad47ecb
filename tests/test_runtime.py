"""Memory that was freed is used again; files are whole or absent; what a machine lacks is told as such."""

from __future__ import annotations

import errno
import platform
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError

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
@pytest.mark.docs
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


def caused(error: Exception, cause: Exception | None) -> Exception:
    error.__cause__ = cause
    return error


FULL = OSError(errno.ENOSPC, "No space left on device")
LIBRARIES = [  # what libraries raise when a disk is full, and whether they say so
    (caused(ValueError("you tried to log 1.0 which is currently not supported"), FULL), True),  # Lightning
    (caused(RuntimeError("unexpected pos 960 vs 854"), FULL), True),  # torch
    (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
    (RuntimeError("NetCDF: HDF error"), False),
    (PermissionError(errno.EACCES, "Permission denied"), False),  # netCDF, when it cannot create a file
]


@pytest.mark.parametrize(("error", "said"), LIBRARIES, ids=[type(error).__name__ + str(i) for i, (error, _) in
                                                            enumerate(LIBRARIES)])  # fmt: skip
def test_a_full_disk_is_told_whatever_a_library_raises(tmp_path, monkeypatch, error, said):
    usage = shutil.disk_usage(tmp_path)
    for free, told in ((5000, True), (10**9, said)):
        monkeypatch.setattr("cosprobe.files.shutil.disk_usage", lambda path, free=free: usage._replace(free=free))
        expected = InputError if told or isinstance(error, OSError) else type(error)
        with pytest.raises(expected) as caught, whole_file(tmp_path / "a.nc", 2_000_000) as part:
            part.write_text("half")
            raise error
        text = str(caught.value)
        assert ("No space left" in text and "needs 2.0 MB" in text and "free there" in text) or not told, text
    assert not list(tmp_path.iterdir())


def test_the_free_space_is_told_without_what_was_written_of_the_file(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)

    def as_on_a_small_disk(path):
        used = sum(file.stat().st_size for file in tmp_path.iterdir())
        return usage._replace(free=700_000 - used)

    monkeypatch.setattr("cosprobe.files.shutil.disk_usage", as_on_a_small_disk)
    with pytest.raises(InputError, match=r"needs 1\.0 MB, 0\.7 MB free there"):  # noqa: SIM117
        with whole_file(tmp_path / "a.nc", 1_000_000) as part:
            part.write_bytes(bytes(699_000))
            raise RuntimeError("NetCDF: HDF error")


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
