"""A run on samples that are too long for the model: refused at the start, left out and counted, or cut."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path

import pytest

from pipeline.data.shards import IndexedShards
from pipeline.errors import Interrupted, UserError
from pipeline.planning.sample_lengths import measure
from pipeline.planning.too_long import decide
from pipeline.sequence.run import run_sequence
from pipeline.sequence.stage import StageTrainer
from tests import tiny, tiny_clip
from tests.e2e.conftest import recipe_on

EMOJI = "\N{GRINNING FACE}"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One task of seven training and five test samples, of which one each is too long in tokens, not in characters."""
    from data_prep.prepare import prepare

    root = tmp_path_factory.mktemp("long")
    tiny.save_llava(root / "llava", tied=True)
    tiny_clip.save_clip(root / "clip")
    folder = tiny_clip.save_coin(root / "coin", "T0", train=6, test=4) / "instructions" / "T0"
    for name in ("train", "test"):
        path = folder / f"{name}.json"
        entries = json.loads(path.read_text())
        entries.insert(2, json.loads(json.dumps(entries[0])))
        entries[2]["id" if "id" in entries[2] else "question_id"] = "emoji"
        asked = EMOJI * 120 + " in one word?"
        if "conversations" in entries[2]:
            entries[2]["conversations"][0]["value"] = asked
        else:
            entries[2]["text"] = asked
        entries[1] = json.loads(json.dumps(entries[1]).replace("what", "w" * 150))
        path.write_text(json.dumps(entries))
    prepare(recipe_on(root, root / "unused", 1), progress=False)
    return root


def recipe(project: Path, runs: Path, too_long: str, **changes):
    made = recipe_on(project, runs, 1, train__steps=4, train__global_batch=2, **changes)
    return made.model_copy(
        update={
            "data": made.data.model_copy(update={"too_long": too_long}),
            "model": made.model.model_copy(update={"max_length": 300}),
        }
    )


def seen(monkeypatch) -> list[str]:
    """Ids of the samples that a run's batches hold, filled in while it runs."""
    from pipeline.data import collate

    ids: list[str] = []
    make = collate.collate

    def noted(*args, **kwargs):
        batch = make(*args, **kwargs)
        ids.extend(batch.ids)
        return batch

    monkeypatch.setattr(collate, "collate", noted)
    return ids


def test_refuse_ends_the_start_before_anything_is_trained(project, tmp_path, monkeypatch):
    monkeypatch.setattr(StageTrainer, "train", lambda *_: pytest.fail("trained"))
    with pytest.raises(UserError) as refused:
        run_sequence(recipe(project, tmp_path, "refuse"))
    for split in ("train", "test"):
        assert f"T0/{split}: 1 of" in str(refused.value)
    assert "'emoji'" in str(refused.value) and "data.too_long" in str(refused.value)


def test_a_stage_that_an_earlier_version_finished_is_not_refused_for_a_sample_it_never_reached(project, tmp_path):
    """Earlier versions looked at a training sample's length when its turn came; a stage may have ended before that."""
    run_sequence(recipe(project, tmp_path, "skip"), stages="train")
    refusing = recipe(project, tmp_path, "refuse")
    (refusing.run_path / "lengths.json").unlink()
    shards = {split: [IndexedShards(refusing.data.split_path("T0", split))] for split in ("train", "test")}
    with pytest.raises(UserError) as refused:
        decide(refusing.model, refusing.data, refusing.run_path, shards)
    assert "T0/test: 1 of" in str(refused.value) and "T0/train" not in str(refused.value)


def test_a_run_can_be_stopped_while_its_samples_are_measured(project, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.ranks.world.ROUND_S", 0.05)
    monkeypatch.setattr("pipeline.sequence.opened.Models", lambda *_: pytest.fail("went on"))
    leave = threading.Event()

    def told_to_stop(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGUSR1)
        leave.wait(20)
        return measure(*args, **kwargs)

    monkeypatch.setattr("pipeline.planning.too_long.measure", told_to_stop)
    with pytest.raises(Interrupted, match="looked through"):
        run_sequence(recipe(project, tmp_path, "skip"))
    leave.set()


def test_what_the_refusal_advises_goes_on_in_the_same_folder(project, tmp_path):
    with pytest.raises(UserError):
        run_sequence(recipe(project, tmp_path, "refuse"))
    run_sequence(recipe(project, tmp_path, "truncate"))
    with pytest.raises(UserError, match="belongs to another recipe"):
        run_sequence(recipe(project, tmp_path, "refuse"))


def test_skip_leaves_it_out_of_training_and_counts_it_wrong_in_the_test(project, tmp_path, monkeypatch):
    ids = seen(monkeypatch)
    settings = recipe(project, tmp_path, "skip")
    result = run_sequence(settings)
    run = settings.run_path
    assert "emoji" not in ids and len(set(ids)) > 4
    told = json.loads((run / "run.json").read_text())
    assert told["left_out"] == {"T0/train": 1, "T0/test": 1}
    lines = [json.loads(line) for line in (run / "eval" / "after-01" / "T0.jsonl").read_text().splitlines()]
    (left,) = [line for line in lines if line["id"] == "emoji"]
    assert len(lines) == 5 and left["prediction"] == "" and left["score"] == 0
    assert run_sequence(settings)["accuracy"] == result["accuracy"]


def test_what_was_left_out_stays_so_when_a_run_goes_on(project, tmp_path, monkeypatch):
    settings = recipe(project, tmp_path, "skip")
    run_sequence(settings, stages="train")
    monkeypatch.setattr("pipeline.planning.too_long.measure", lambda *_, **__: pytest.fail("measured again"))
    run_sequence(settings)
    assert json.loads((settings.run_path / "run.json").read_text())["left_out"]["T0/train"] == 1


def test_truncate_cuts_the_question_and_keeps_every_sample(project, tmp_path, monkeypatch):
    ids = seen(monkeypatch)
    settings = recipe(project, tmp_path, "truncate")
    run_sequence(settings)
    assert "emoji" in ids
    lines = (settings.run_path / "eval" / "after-01" / "T0.jsonl").read_text().splitlines()
    assert "emoji" in {json.loads(line)["id"] for line in lines}
    assert json.loads((settings.run_path / "run.json").read_text())["left_out"] == {}
