"""Files that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.files import replacing


def test_a_file_may_be_read_by_whom_the_umask_says_whatever_wrote_it(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "sets.safetensors") as temporary:
            save_file({"values": torch.zeros(2)}, temporary)
    finally:
        os.umask(before)
    assert (tmp_path / "sets.safetensors").stat().st_mode & 0o777 == 0o640


def test_what_fails_on_the_way_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(ValueError), replacing(path) as temporary:
        temporary.write_text("ne")
        raise ValueError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
