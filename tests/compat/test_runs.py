"""Kept run folders are listed, reported, asked, exported, evaluated anew and resumed to where they would have come."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.compat.inner import logits_of
from tests.compat.kept import (
    ELSEWHERE,
    KEPT,
    TENSORS,
    assert_contains,
    assert_same_numbers,
    assert_same_values,
    learned,
    numbers_of,
    succeeded,
    tolerance,
)

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("working")]

UNFINISHED = {"sequence": "stages/03-T2", "projector": "stages/02-T1", "benchmark": "units/mpl-toys-s2"}
SEQUENCE, BENCHMARK = Path("runs/sequence"), Path("runs/benchmark")
FINISHED = KEPT / "finished"


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def finished_files(run: Path) -> Mapping[str, bytes]:
    """What finished stages and units hold, which nothing may change."""
    folders = [path.parent for path in run.glob("*/*/COMPLETE")]
    return {str(path): path.read_bytes() for folder in folders for path in folder.iterdir() if path.is_file()}


def picture_of(task: str, split: str, number: int) -> Path:
    """The picture of a prepared sample, as a file."""
    path = Path(f"{task}-{number}.png")
    with tarfile.open(f"data/sequence/{task}/{split}/shard-000000.tar") as shard:
        content = shard.extractfile(f"{number:08d}.png")
        assert content is not None
        path.write_bytes(content.read())
    return path


def test_they_are_listed_with_how_far_they_are() -> None:
    rows = {row["run"]: row for row in succeeded("ls", "runs", "--json").result["runs"]}
    assert {Path(run).name for run in rows} == set(UNFINISHED)
    assert {row["status"] for row in rows.values()} == {"stopped"}


def test_a_sequence_is_reported_with_its_scores() -> None:
    done = succeeded("report", SEQUENCE, "runs/projector", "--json")
    assert "T2" in (SEQUENCE / "report.html").read_text("utf-8")
    assert done.result["report"] == str(SEQUENCE / "report.html")
    assert "80.0" in done.out  # T1 after its own stage


def test_a_benchmark_is_reported_with_its_scores() -> None:
    done = succeeded("report", BENCHMARK, "--json")
    assert "promptsrc" in (BENCHMARK / "report.html").read_text("utf-8")
    assert_contains(done.result["results"][str(BENCHMARK)], read(BENCHMARK / "results.json")["lines"])


@pytest.mark.parametrize("number", [0, 3])  # with and without a picture
def test_a_run_answers_a_question_as_it_was_evaluated(number: int) -> None:
    sample = lines(SEQUENCE / "eval/after-02/T1.jsonl")[number]
    image: list[str | Path] = [] if number == 3 else ["--image", picture_of("T1", "test", number)]
    answer = succeeded("predict", SEQUENCE, "--question", sample["question"], *image, "--json").result
    assert answer["answer"] == sample["prediction"]
    assert answer["selected"] == sample["selected"]
    assert list(answer["similarity"].values()) == pytest.approx(sample["similarity"], abs=1e-4)  # answers round them


def test_a_run_is_exported_as_an_adapter_of_its_finished_stages() -> None:
    succeeded("export", SEQUENCE, "exported")
    pool = load_file(Path("exported") / TENSORS)
    for number, stage in enumerate(("01-T0", "02-T1")):
        values = learned(SEQUENCE / "stages" / stage)
        assert torch.equal(pool["prompts"][number], values["prompt"])
        assert torch.equal(pool["prototypes"][number], values["prototype"])


@pytest.mark.parametrize("run", ["sequence", "projector", "benchmark"])
def test_an_evaluation_finds_that_nothing_is_missing(run: str) -> None:
    path = Path("runs") / run
    result = path / ("results.json" if run == "benchmark" else "matrix.json")
    before, scores = finished_files(path), read(result)
    answers = {file: file.read_bytes() for file in path.glob("eval/*/*")}
    succeeded("evaluate", path)
    assert finished_files(path) == before
    after = {file: file.read_bytes() for file in path.glob("eval/*/*")}
    assert {file: after[file] for file in answers} == answers
    # The kept runs are of a version that measured nothing with the task told.
    assert {file.parent.name for file in after.keys() - answers.keys()} <= {"told-02"}
    assert_contains(read(result), scores)


def test_a_missing_evaluation_is_made_of_the_answers_of_the_others() -> None:
    scores = read(SEQUENCE / "matrix.json")
    before = lines(SEQUENCE / "eval/after-02/T1.jsonl")
    (SEQUENCE / "matrix.json").unlink()
    shutil.rmtree(SEQUENCE / "eval/after-01")
    for file in (SEQUENCE / "eval/after-02").glob("T1*"):
        file.unlink()
    # Nothing generates this text: an answer with it was taken from where the same sets gave it before.
    told = SEQUENCE / "eval/after-02/T0.jsonl"
    marked = [json.dumps({**line, "prediction": "as told before"}) + "\n" for line in lines(told)]
    told.write_text("".join(marked), "utf-8")
    (SEQUENCE / "eval/after-02/T0.score.json").unlink()
    succeeded("evaluate", SEQUENCE)
    assert_contains(lines(SEQUENCE / "eval/after-02/T1.jsonl"), before)
    assert_contains(read(SEQUENCE / "matrix.json")["zero_shot"], scores["zero_shot"])


@pytest.mark.parametrize("run", ["sequence", "projector", "benchmark"])
def test_a_run_that_was_stopped_inside_a_stage_comes_to_where_it_would_have_come(run: str) -> None:
    path, last, within = Path("runs") / run, UNFINISHED[run], tolerance("artefacts")
    before, begun = finished_files(path), numbers_of(path / f"{last}.unfinished")
    succeeded("run", f"recipes/{run}.yaml")
    assert read(path / "run.json")["status"] == "done"
    assert {name: content for name, content in finished_files(path).items() if name in before} == before
    numbers = numbers_of(path / last)
    assert_same_numbers({name: values[: len(begun[name])] for name, values in numbers.items()}, begun, run, None)
    assert_same_values(learned(path / last), load_file(FINISHED / run / TENSORS), run, within)
    result = "results.json" if run == "benchmark" else "matrix.json"
    found, expected = read(path / result), read(FINISHED / run / result)
    if within is None:
        assert_contains(found, expected)
    elif run != "benchmark":  # the rows of finished stages are answers that were there already
        assert_contains(found["accuracy"][:-1], expected["accuracy"][:-1])


@pytest.mark.slow
@pytest.mark.gloo
def test_a_run_of_one_rank_is_resumed_by_two_under_zero_2() -> None:
    settings = ("train.processes=2", "train.deepspeed=ds_configs/zero2.json")
    succeeded("run", "recipes/sequence.yaml", *(part for text in settings for part in ("--set", text)))
    assert read(SEQUENCE / "run.json")["world_size"] == 2
    # Two ranks add gradients in another order, as another processor does.
    found, expected = learned(SEQUENCE / "stages/03-T2"), load_file(FINISHED / "sequence" / TENSORS)
    assert_same_values(found, expected, "ZeRO-2", ELSEWHERE)


def test_the_units_of_a_benchmark_are_classifiers_of_any_names() -> None:
    kept = load_file(FINISHED / "benchmark/logits.safetensors")
    for unit in sorted(path.parent for path in (BENCHMARK / "units").glob("*/COMPLETE")):
        torch.testing.assert_close(logits_of(unit, kept["images"]), kept[f"logits.{unit.name}"], rtol=1e-4, atol=1e-5)
