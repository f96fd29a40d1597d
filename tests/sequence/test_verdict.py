"""`run` says which tasks were not learned, gained nothing or are routed wrongly, and nothing of the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.load import load_recipe
from pipeline.runs.folder import read_run
from pipeline.sequence.verdict import Fault, faults_of, lines_of

RECIPE = load_recipe("nano", ["train.steps=150", "model.path=some/model"])
GOOD: dict[str, Any] = {"accuracy": [[90.0, None], [70.0, 80.0]], "majority": [10.0, 20.0], "zero_shot": [30.0, 40.0]}


def faults(folder: Path, train: int = 500, test: int = 200, state: Any = None, **matrix: Any) -> list[Fault]:
    """The faults of a run of the tasks A and B, which is good but for what is given."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "matrix.json").write_text(json.dumps({"tasks": ["A", "B"], **GOOD, **matrix}))
    data = {task: {"train": {"used": train}, "test": {"used": test}} for task in "AB"}
    (folder / "run.json").write_text(json.dumps({"stages": ["A", "B"], "data": data, **(state or {})}))
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": {"tasks": [{"name": "A"}, {"name": "B"}]}}))
    return faults_of(read_run(folder), RECIPE)


def test_nothing_is_said_of_a_run_in_which_all_is_well(tmp_path: Path) -> None:
    assert faults(tmp_path / "a") == []
    assert faults(tmp_path / "b", told=[None, [74.9, 80.0]]) == []
    assert faults(tmp_path / "c", state={"stages": []}, accuracy=[]) == [], "zero-shot learns nothing"


@pytest.mark.parametrize("score", [19.0, 20.0])
def test_a_task_no_better_than_one_answer_was_not_learned(tmp_path: Path, score: float) -> None:
    (fault,) = faults(tmp_path / "a", accuracy=[[90.0, None], [70.0, score]])
    assert (fault.task, fault.kind, fault.score, fault.against) == ("B", "not_learned", score, 20.0)
    assert fault.sentence.startswith(f"B was not learned: it scores {score:.1f}, and the most frequent training answer")
    assert "\n" not in fault.sentence and fault.to_json()["sentence"] == fault.sentence


def test_a_task_that_was_forgotten_or_is_misrouted_was_learned(tmp_path: Path) -> None:
    assert faults(tmp_path / "a", accuracy=[[90.0, None], [5.0, 80.0]]) == []
    (fault,) = faults(tmp_path / "b", accuracy=[[90.0, None], [70.0, 15.0]], told=[None, [70.0, 80.0]])
    assert fault.kind == "misrouted"


def test_a_task_no_better_than_the_frozen_model_gained_nothing(tmp_path: Path) -> None:
    (fault,) = faults(tmp_path / "a", accuracy=[[90.0, None], [70.0, 40.0]])
    assert (fault.kind, fault.against) == ("no_gain", 40.0)
    assert fault.sentence.startswith("B gained nothing: it scores 40.0, and the frozen model 40.0. It may be because")


def test_routing_is_named_where_it_costs_much_with_the_task_that_is_taken_instead(tmp_path: Path) -> None:
    confusion = {"A": {"A": 60.0, "B": 40.0}, "B": {"B": 100.0}}
    (fault,) = faults(tmp_path / "a", told=[None, [90.0, 80.0]], routing={"confusion": confusion})
    assert (fault.task, fault.kind, fault.score, fault.against) == ("A", "misrouted", 70.0, 90.0)
    assert fault.sentence.startswith(
        "A scores 70.0, and with the task told 90.0. For 40.0 percent of its questions the"
    )
    assert "router ranks B first" in fault.sentence


def test_the_causes_are_those_of_add(tmp_path: Path) -> None:
    bad: dict[str, Any] = {"accuracy": [[90.0, None], [70.0, 0.0]]}
    (few,) = faults(tmp_path / "a", train=46, test=4, **bad)
    assert "46 training samples are few" in few.sentence and "4 test samples say little" in few.sentence
    (short,) = faults(tmp_path / "b", train=4000, **bad)
    assert "raise train.steps" in short.sentence
    free: dict[str, Any] = {"accuracy": [[90.0, None], [70.0, 60.0]], "zero_shot": None}
    (wrapped,) = faults(tmp_path / "c", format_free=free, **bad)
    assert "60.0 percent are right but for case" in wrapped.sentence
    (unknown,) = faults(tmp_path / "d", state={"data": None}, **bad)
    assert "the module may be too small" in unknown.sentence


def test_only_tasks_that_were_scored_are_judged(tmp_path: Path) -> None:
    (fault,) = faults(tmp_path / "a", accuracy=[[5.0, None], [None, None]])
    assert (fault.task, fault.kind) == ("A", "not_learned")


def score_file(folder: Path, score: float, **made_with: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"data": "d", "base_model": "m", "insertion": "after_bos", **made_with}
    content = {"metric": "exact", "scoring": "coin", "samples": 200, "score": score, "made_with": facts}
    (folder / "B.score.json").write_text(json.dumps(content))


def test_the_frozen_model_s_score_may_be_that_of_a_run_beside_it(tmp_path: Path) -> None:
    run, other = tmp_path / "mine", tmp_path / "other" / "eval" / "zero-shot"
    missing: dict[str, Any] = {"accuracy": [[90.0, None], [70.0, 40.0]], "zero_shot": None}
    score_file(run / "eval" / "after-02", 40.0, insertion="after_image")
    assert faults(run, **missing) == []
    score_file(other, 50.0, data="another")
    assert faults(run, **missing) == [], "a score on other samples says nothing"
    score_file(other, 50.0)
    (fault,) = faults(run, **missing)
    assert (fault.task, fault.kind, fault.against) == ("B", "no_gain", 50.0)


def lines(folder: Path, **matrix: Any) -> list[str]:
    """What a page says first of the run of `faults`, whose config.yaml is a whole recipe."""
    faults(folder, **matrix)
    load_recipe("nano", ["data.tasks=[{name: A}, {name: B}]", "train.steps=150"]).dump_yaml(folder / "config.yaml")
    return lines_of(read_run(folder))


def test_a_page_says_that_tasks_were_learned_and_what_they_are_better_than(tmp_path: Path) -> None:
    references = "above the most frequent training answer and the frozen model"
    assert lines(tmp_path / "a") == [f"All 2 tasks were learned: with its own module each scores {references}."]
    assert lines(tmp_path / "b", zero_shot=None, accuracy=[[90.0, None], [None, None]]) == [
        "The task was learned: with its own module it scores above the most frequent training answer."
    ]
    assert lines(tmp_path / "c", zero_shot=None, majority=None) == [], "it was compared with nothing"
    assert lines(tmp_path / "d", accuracy=[[None, None], [None, None]]) == []


def test_a_page_says_a_task_s_fault_with_its_causes_and_of_a_damaged_recipe_without(tmp_path: Path) -> None:
    bad: dict[str, Any] = {"accuracy": [[90.0, None], [70.0, 20.0]]}
    (line,) = lines(tmp_path / "a", **bad, train=4000)
    assert line.startswith("B was not learned: it scores 20.0") and "raise train.steps" in line
    (tmp_path / "a" / "config.yaml").unlink()
    (line,) = lines_of(read_run(tmp_path / "a"))
    assert line.startswith("B was not learned: it scores 20.0") and "train.steps" not in line
