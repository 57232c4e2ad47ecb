"""Memory that was freed is used again."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PAGES = """
import resource, sys, torch
from cosprobe.runtime import keep_freed_memory
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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries are left as they are")
def test_freed_memory_is_handed_out_again():
    kept, given_back = _fresh_pages("kept"), _fresh_pages("default")
    print(f"fresh pages of 20 tensors of 64 MiB: {kept} kept, {given_back} given back")  # noqa: T201
    assert kept < 100 < given_back
