"""Whether freed memory is kept, by the pages that the system had to give again."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource
import torch
from pipeline.ranks import heap
heap.{called}()
pages = []
for _ in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(size, dtype=torch.uint8) for size in (96 << 20, 8 << 20)]
    del blocks
    pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(*pages[8:])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these switches")
@pytest.mark.parametrize(("called", "kept"), [("keep_freed_blocks", True), ("return_freed_blocks", False)])
def test_blocks_are_used_again_or_returned(called: str, kept: bool) -> None:
    said = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(called=called)], capture_output=True, text=True, check=True
    ).stdout
    pages = [int(word) for word in said.split()]
    assert len(pages) == 4 and all((count < 100) == kept for count in pages), pages
