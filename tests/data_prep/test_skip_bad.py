"""Records that cannot be used: named before training, or left out up to a number and listed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from data_prep import prepare as prepare_module
from data_prep.prepare import prepare
from data_prep.verify import VERIFIED_FILE, verify_split
from pipeline.cli.commands import app
from pipeline.data.shards import IndexedShards
from pipeline.errors import EXIT_USER, UserError
from tests.tiny_clip import picture


def _edit(root: Path, split: str, change: Any) -> None:
    path = root / "instructions" / "Shapes" / f"{split}.json"
    entries = json.loads(path.read_text())
    change(entries)
    path.write_text(json.dumps(entries))


@pytest.fixture
def broken(recipe, tmp_path):
    """Two bad records among seven for training (one ends a shard's range), one among five for testing."""
    (tmp_path / "coin" / "images" / "Shapes-train-2.jpg").write_bytes(b"no image")
    _edit(tmp_path / "coin", "train", lambda entries: entries[6].update(id="Shapes-0"))
    _edit(tmp_path / "coin", "test", lambda entries: entries[0].pop("answer"))
    return lambda skip_bad, **data: recipe(skip_bad=skip_bad, **data)


def _described(recipe: Any, split: str) -> dict[str, Any]:
    return IndexedShards(recipe.data.split_path("Shapes", split)).description


def test_without_tolerance_the_first_one_ends_it_with_its_file_and_record(broken):
    with pytest.raises(UserError, match=r"train\.json, entry 2 \(id 'Shapes-2'\): the image .* `--skip-bad 1` allows"):
        prepare(broken(0), progress=False)


def test_as_many_as_allowed_are_left_out_and_listed(broken):
    recipe = broken(3)
    result = prepare(recipe, progress=False)
    assert [split["samples"] for split in result["splits"]] == [5, 4]
    assert len(result["skipped"]) == 3
    train = _described(recipe, "train")["skipped"]
    assert [record["record"] for record in train] == ["entry 2 (id 'Shapes-2')", "entry 6 (id 'Shapes-0')"]
    assert [record["record"] for record in _described(recipe, "test")["skipped"]] == ["entry 0 (id '0')"]
    assert IndexedShards(recipe.data.split_path("Shapes", "train")).ids == [f"Shapes-{n}" for n in (0, 1, 3, 4, 5)]


def test_the_number_counts_for_all_splits_together(broken):
    with pytest.raises(UserError, match=r"test\.json, entry 0 .*besides the 2 before it: `--skip-bad 3` allows"):
        prepare(broken(2), progress=False)


def test_a_second_prepare_is_up_to_date_and_lists_them_again(broken):
    recipe = broken(3)
    first = prepare(recipe, progress=False)
    files = {path: path.stat().st_mtime_ns for path in Path(recipe.data.prepared).rglob("*")}
    again = prepare(recipe, progress=False)
    assert again["skipped"] == first["skipped"]
    assert not any(split["wrote"] for split in again["splits"])
    assert files == {path: path.stat().st_mtime_ns for path in Path(recipe.data.prepared).rglob("*")}


def test_more_tolerance_rewrites_nothing_and_less_is_refused(broken):
    prepare(broken(3), progress=False)
    assert not any(split["wrote"] for split in prepare(broken(9), progress=False)["splits"])
    with pytest.raises(UserError, match=r"entry 2 \(id 'Shapes-2'\)"):
        prepare(broken(0), progress=False)


def test_a_mended_record_is_taken_up(broken, tmp_path):
    prepare(broken(3), progress=False)
    (tmp_path / "coin" / "images" / "Shapes-train-2.jpg").write_bytes(picture(2, kind="JPEG"))
    result = prepare(broken(3), progress=False)
    assert [(split["samples"], split["wrote"]) for split in result["splits"]] == [(6, ["shards", "keys"]), (4, [])]
    assert len(result["skipped"]) == 2


def test_a_write_that_stopped_goes_on_with_what_it_had_left_out(broken, monkeypatch):
    from data_prep import shards

    write, calls = shards._write_shard, []
    recipe = broken(3, shard_samples=2)

    def stop_at_third(folder, number, *others):
        calls.append(number)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return write(folder, number, *others)

    monkeypatch.setattr(shards, "_write_shard", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        prepare(recipe, progress=False)
    result = prepare(recipe, progress=False)
    assert calls[:4] == [0, 1, 2, 2]
    assert len(result["skipped"]) == 3
    assert IndexedShards(recipe.data.split_path("Shapes", "train")).ids == [f"Shapes-{n}" for n in (0, 1, 3, 4, 5)]
    assert len(_described(recipe, "train")["skipped"]) == 2


def test_a_split_of_bad_records_alone_has_no_samples(recipe, tmp_path):
    built = recipe(skip_bad=9)
    _edit(tmp_path / "coin", "test", lambda entries: [entry.pop("text") for entry in entries])
    with pytest.raises(UserError, match="test split of task 'Shapes' has no samples"):
        prepare(built, progress=False)


def test_the_command_line_names_the_record_with_exit_code_2_and_takes_skip_bad(broken, tmp_path):
    broken(0).dump_yaml(tmp_path / "tiny.yaml")
    refused = CliRunner().invoke(app, ["prepare", str(tmp_path / "tiny.yaml")])
    assert refused.exit_code == EXIT_USER
    assert "entry 2 (id 'Shapes-2')" in refused.stderr
    assert len([line for line in refused.stderr.splitlines() if line.startswith("error:")]) == 1
    taken = CliRunner().invoke(app, ["prepare", str(tmp_path / "tiny.yaml"), "--skip-bad", "3"])
    assert taken.exit_code == 0, taken.output
    assert taken.output.count("left out: ") == 3


def test_what_failed_its_verification_is_not_up_to_date(recipe, monkeypatch):
    def refuse(folder: Path, identity: Any) -> None:
        raise UserError("not whole")

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "verify_split", refuse)
        with pytest.raises(UserError, match="not whole"):
            prepare(recipe(), progress=False)
    splits = prepare(recipe(), progress=False)["splits"]
    assert [split["wrote"] for split in splits] == [["shards", "keys"], ["shards", "keys"]]


def test_what_was_stopped_before_its_verification_is_verified_by_the_next_call(recipe, monkeypatch):
    verified: list[str] = []

    def watched(folder: Path, identity: Any) -> dict[str, Any]:
        verified.append(folder.name)
        return verify_split(folder, identity)

    def interrupt(folder: Path, identity: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "verify_split", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(recipe(), progress=False)
    monkeypatch.setattr(prepare_module, "verify_split", watched)
    prepare(recipe(), progress=False)
    assert verified == ["train", "test"]
    prepare(recipe(), progress=False)
    assert verified == ["train", "test"]
    assert (recipe().data.split_path("Shapes", "train") / VERIFIED_FILE).is_file()
