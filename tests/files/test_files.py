"""Files that are whole or not there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pipeline.errors import UserError
from pipeline.files import atomic as files
from pipeline.files.atomic import empty_folder, replacing
from pipeline.prompts.stage_files import start_stage_folder
from pipeline.runs.finished import finish_folder
from pipeline.runs.layout import unfinished_folder


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


@pytest.fixture
def nfs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removing a folder renames the files in it that somebody has open, so it and its folders stay."""

    def rmtree(path: Path, ignore_errors: bool = False) -> None:
        for found in Path(path).rglob("*"):
            if found.is_file() and not found.name.startswith(".nfs"):
                found.rename(found.with_name(".nfs0000000000a1b2c3"))
        assert ignore_errors

    monkeypatch.setattr(shutil, "rmtree", rmtree)


@pytest.mark.usefixtures("nfs")
def test_a_stage_begins_anew_while_its_earlier_log_is_still_open_over_nfs(tmp_path: Path) -> None:
    left = unfinished_folder(tmp_path, 0, "Count")
    left.mkdir(parents=True)
    (left / "metrics.jsonl").write_text("{}")
    assert start_stage_folder(tmp_path, 0, "Count") == left
    assert not (left / "metrics.jsonl").exists()


@pytest.mark.usefixtures("nfs")
def test_a_stage_is_finished_where_a_damaged_one_s_files_are_still_open_over_nfs(tmp_path: Path) -> None:
    work, final = tmp_path / "work", tmp_path / "final"
    for folder in (work, final):
        folder.mkdir()
        (folder / "metrics.jsonl").write_text(folder.name)
    (work / ".nfs0000000000d4e5f6").mkdir()  # no file that could be opened
    finish_folder(work, final, {"prompt": torch.zeros(1)}, {})
    assert (final / "metrics.jsonl").read_text() == "work"


def test_a_folder_that_cannot_be_emptied_is_refused_with_what_is_in_it(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "old.txt").touch()
    monkeypatch.setattr(files.shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises(UserError, match=r"'old\.txt' in it cannot be removed; remove it"):
        empty_folder(tmp_path)
