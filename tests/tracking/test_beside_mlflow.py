"""Curves in TensorBoard's event files and in Weights & Biases' offline files: each step once, also after a restart."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.load import load_recipe
from pipeline.config.recipe import Recipe
from pipeline.errors import EXTRAS, Interrupted, MissingExtra, UserError, require_extras
from pipeline.tracking import several
from pipeline.tracking.open import make_tracker, sequence_facts
from pipeline.tracking.tensorboard_tracker import read_events
from pipeline.tracking.tracker import NullTracker, Tracker

Points = dict[str, list[tuple[int, float]]]


def recipe(*changes: str) -> Recipe:
    return load_recipe("nano", ["tracking.enabled=false", *changes])


def tracker(run: Path, *changes: str, rank: int = 0) -> Tracker:
    return make_tracker(sequence_facts(recipe(*changes)), run, rank)


def log(found: Tracker, steps: Mapping[int, float], stops: bool = False) -> None:
    """A call in which the first stage logs a loss at these steps, and the run its score."""
    with found.sequence({}), found.stage(0, "Colours"):
        found.metrics({"share": 50.0}, 0)  # as every attempt of a stage does
        for step, loss in steps.items():
            found.metrics({"loss": loss, "missing": None}, step)
        if stops:
            raise Interrupted("told to")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    return tmp_path / "run"


def events(folder: Path) -> Points:
    """What TensorBoard's own reader finds in a folder, in the order of the files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return {
        name: [(event.step, round(event.value, 4)) for event in found.Scalars(name)] for name in found.Tags()["scalars"]
    }


def sent(run: Path) -> dict[str, Points]:
    """What the offline files of Weights & Biases hold, by the name of its run, all calls together."""
    from wandb.proto import wandb_internal_pb2

    curves: dict[str, Points] = {}
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        name = ""
        for content in records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(content)
            if record.WhichOneof("record_type") == "run":
                name = record.run.display_name
            if record.WhichOneof("record_type") == "history":
                items = {
                    item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                step = record.history.step.num if record.history.HasField("step") else items["_step"]
                for key, value in items.items():
                    if not key.startswith("_"):
                        curves.setdefault(name, {}).setdefault(key, []).append((step, value))
    return curves


def records(content: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format, after the service's own header of seven bytes."""
    block, place, parts = 32768, 7, b""
    while place + 7 <= len(content):
        if block - place % block < 7:
            place += block - place % block
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_a_resumed_stage_goes_on_in_the_same_event_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        log(tracker(run, "tracking.tensorboard=true"), {1: 4.0, 2: 3.0, 3: 2.5}, stops=True)
    log(tracker(run, "tracking.tensorboard=true"), {3: 2.5, 4: 2.0})
    stage = run / "tensorboard" / "01-Colours"
    assert events(stage) == {"share": [(0, 50.0)], "loss": [(1, 4.0), (2, 3.0), (3, 2.5), (4, 2.0)]}
    assert {path.name for path in (run / "tensorboard").iterdir()} == {"run", "01-Colours"}


def test_a_number_that_is_another_now_replaces_the_earlier_one(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"
    for scores in ({1: 70.0, 2: 60.0, 3: 50.0}, {2: 65.0}):
        found = tracker(run, "tracking.tensorboard=true")
        with found.sequence({}):
            for step, score in scores.items():
                found.metrics({"last": score}, step)
    assert events(run / "tensorboard" / "run")["last"] == [(1, 70.0), (2, 65.0), (3, 50.0)]
    assert read_events(run / "tensorboard" / "run")["last"][2] == 65.0
    assert not list(run.rglob("*.rewritten"))


def test_the_recipe_is_beside_the_curves_without_passwords(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"
    for _ in range(2):
        log(tracker(run, "tracking.tensorboard=true", "tracking.uri=http://me:secret@host:5000"), {1: 1.0})
    content = b"".join(path.read_bytes() for path in (run / "tensorboard" / "run").iterdir())
    assert content.count(b"method.name: modalprompt") == 1 and b"host:5000" in content and b"secret" not in content


def test_offline_runs_of_a_stage_have_one_identity_and_each_step_once(offline: Path) -> None:
    with pytest.raises(Interrupted):
        log(tracker(offline, "tracking.wandb=true"), {1: 4.0, 2: 3.0, 3: 2.5}, stops=True)
    ids = {label: entry["id"] for label, entry in json.loads((offline / "wandb" / "runs.json").read_text()).items()}
    log(tracker(offline, "tracking.wandb=true"), {3: 2.5, 4: 2.0})
    kept = json.loads((offline / "wandb" / "runs.json").read_text())
    assert {label: entry["id"] for label, entry in kept.items()} == ids and set(ids) == {"run", "01-Colours"}
    folders = [path.name for path in offline.glob("wandb/offline-run-*")]
    # A second run within the same second gets a number behind its identity.
    assert len(folders) == 4 and all(sum(f"-{found}" in name for name in folders) == 2 for found in ids.values())
    assert sent(offline)["01-Colours"] == {"share": [(0, 50.0)], "loss": [(1, 4.0), (2, 3.0), (3, 2.5), (4, 2.0)]}


def test_without_a_key_nothing_is_asked_and_the_curves_are_kept(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(offline.parent / "netrc"))
    monkeypatch.setenv("HOME", str(offline.parent))
    log(tracker(offline, "tracking.wandb=true"), {1: 4.0})
    assert sent(offline)["01-Colours"]["loss"] == [(1, 4.0)]


def test_only_rank_0_writes_and_nothing_without_the_settings(tmp_path: Path) -> None:
    both = ("tracking.tensorboard=true", "tracking.wandb=true")
    assert isinstance(tracker(tmp_path / "run", *both, rank=1), NullTracker)
    silent = tracker(tmp_path / "run")
    log(silent, {1: 1.0})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_one_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXTRAS, name, ("no_such_package",))
    asked = recipe(f"tracking.{name}=true").tracking
    assert asked.extras == (name,)
    with pytest.raises(MissingExtra, match=rf'run `pip install "continual-prompts\[{name}\]"`'):
        require_extras(*asked.extras)


def test_a_service_that_cannot_be_opened_ends_the_run_with_a_sentence(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "run").write_text("a file where the run's folder has to be")
    found = tracker(tmp_path / "run", "tracking.tensorboard=true")
    with pytest.raises(UserError, match=r"TensorBoard cannot be used .*; mend that, or set tracking\.tensorboard to"):
        log(found, {1: 1.0})


def test_a_service_that_fails_later_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("tensorboard")
    found = tracker(tmp_path / "run", "tracking.tensorboard=true")
    with found.sequence({}), found.stage(0, "Colours"):

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        found._open[-1]._writer.add_scalar = full  # type: ignore[attr-defined]
        for step in (1, 2):
            found.metrics({"loss": 1.0}, step)
    (said,) = [record.getMessage() for record in caplog.records if "TensorBoard failed" in record.getMessage()]
    assert "No space left on device" in said and "training goes on" in said


def test_several_trackers_are_all_told(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    one, two = (tracker(tmp_path / name, "tracking.tensorboard=true") for name in ("one", "two"))
    log(several.SeveralTrackers([one, two]), {1: 4.0})
    assert events(tmp_path / "one" / "tensorboard" / "01-Colours") == events(
        tmp_path / "two" / "tensorboard" / "01-Colours"
    )
