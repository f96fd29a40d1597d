"""What routing costs the answers of a run: two tasks that take each other's questions."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from data_prep.prepare import prepare
from pipeline.config.recipe import Recipe
from pipeline.data.collate import Examples
from pipeline.data.selection import NO_SET, as_selection
from pipeline.errors import Interrupted
from pipeline.prompts.generation import Conditions, Modules
from pipeline.report.page import write_report
from pipeline.runs.folder import read_run
from pipeline.sequence import evaluate
from pipeline.sequence.run import evaluate_run, run_sequence
from pipeline.tracking.tracker import NullTracker
from tests import tiny, tiny_clip
from tests.e2e.conftest import recipe_on
from tests.processes import torchrun

pytestmark = pytest.mark.e2e

QUESTIONS = {"T0": "which colour has the box on the left?", "T1": "how many?"}
METHOD = {"name": "task_lora", "rank": 2, "alpha": 4.0}
SAMPLES = 5  # test samples per task, of which the last two ask as the other task does


def save_task(root: Path, name: str) -> None:
    """A task in CoIN layout that is trained on one question, and tested with it and the other task's."""
    (other,) = (text for task, text in QUESTIONS.items() if task != name)
    folder = root / "instructions" / name
    folder.mkdir(parents=True)
    (root / "images").mkdir(exist_ok=True)
    (root / "images" / "one.png").write_bytes(tiny_clip.picture(3))
    answer, image = f"set {name}", "images/one.png"
    turns = [{"from": "human", "value": f"<image>\n{QUESTIONS[name]}"}, {"from": "gpt", "value": answer}]
    train = [{"id": f"{name}-{n}", "image": image, "conversations": turns} for n in range(6)]
    asked = [QUESTIONS[name]] * (SAMPLES - 2) + [other] * 2
    test = [
        {"question_id": n, "image": image, "text": text, "answer": answer, "size": [20, 12]}
        for n, text in enumerate(asked)
    ]
    for split, entries in (("train", train), ("test", test)):
        (folder / f"{split}.json").write_text(json.dumps(entries), "utf-8")


@pytest.fixture(scope="module")
def stealing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models and the two tasks, prepared."""
    root = tmp_path_factory.mktemp("stealing")
    tiny.save_llava(root / "llava", tied=True)
    tiny_clip.save_clip(root / "clip")
    for name in QUESTIONS:
        save_task(root / "coin", name)
    prepare(recipe_on(root, root / "unused", 2), progress=False)
    return root


class Sets:
    """Stands in for the model: a sample's answer is the name of its foremost set. Counts what is answered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[str, int]] = []  # (own task, sample)
        self.stop_at: tuple[str, int, int] | None = None  # own task, sample and set at which a signal arrives
        monkeypatch.setattr(evaluate, "generate_answers", self.generate)

    def generate(
        self, lmm: Any, examples: Examples, indices: Sequence[int], modules: Modules, decoding: Any, given: Conditions
    ) -> dict[int, str]:
        numbers = as_selection(modules.selected).numbers
        answers = {}
        for index in indices:
            if not given.go_on():
                break
            own, chosen = examples.data[index].answer.removeprefix("set "), numbers[index][numbers[index] != NO_SET]
            self.asked.append((own, index))
            answers[index] = f"set T{int(chosen[-1])}" if len(chosen) else "none"
            if self.stop_at == (own, index, int(chosen[-1])):
                os.kill(os.getpid(), signal.SIGTERM)
        return answers


@pytest.fixture
def sets(monkeypatch: pytest.MonkeyPatch) -> Sets:
    return Sets(monkeypatch)


def stealing_recipe(root: Path, runs: Path, **changes: Any) -> Recipe:
    fields = {"method": METHOD, "evaluate__zero_shot": False, "evaluate__batch": 1, "train__lr_prompt": 0.05}
    return recipe_on(root, runs, 2, **{**fields, **changes})


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def by_hand(run: Path, task: str) -> tuple[float, float]:
    """The scores told and routed of a task, counted in the prediction files."""
    routed = {line["id"]: line["score"] for line in lines(run / "eval" / "after-02" / f"{task}.jsonl")}
    told = routed | {line["id"]: line["score"] for line in lines(run / "eval" / "told-02" / f"{task}.jsonl")}
    return 100 * sum(told.values()) / len(told), 100 * sum(routed.values()) / len(routed)


def test_routing_costs_what_the_prediction_files_say(stealing: Path, tmp_path: Path, sets: Sets) -> None:
    recipe = stealing_recipe(stealing, tmp_path)
    matrix = run_sequence(recipe)
    assert matrix["told"] == [None, [100.0, 100.0]] and matrix["accuracy"][1] == [60.0, 60.0]
    assert matrix["metrics"]["told"] == 100.0 and matrix["metrics"]["routing_loss"] == 40.0
    assert matrix["metrics"]["routing_loss_per_task"] == [40.0, 40.0]
    for place, task in enumerate(QUESTIONS):
        assert by_hand(recipe.run_path, task) == (matrix["told"][1][place], matrix["accuracy"][1][place])
        answered = lines(recipe.run_path / "eval" / "told-02" / f"{task}.jsonl")
        assert [(line["id"], line["selected"], line["prediction"]) for line in answered] == [
            (str(number), [task], f"set {task}") for number in (3, 4)
        ]
    assert matrix["routing"]["accuracy"] == [60.0, 60.0]
    assert matrix["routing"]["confusion"] == {"T0": {"T0": 60.0, "T1": 40.0}, "T1": {"T0": 40.0, "T1": 60.0}}
    assert matrix["routing"]["confused"] == [
        {"task": "T0", "taken_by": "T1", "percent": 40.0},
        {"task": "T1", "taken_by": "T0", "percent": 40.0},
    ]


@pytest.mark.parametrize("reuse", [True, False])
def test_only_misrouted_samples_are_answered_again(stealing: Path, tmp_path: Path, sets: Sets, reuse: bool) -> None:
    recipe = stealing_recipe(stealing, tmp_path, evaluate__reuse=reuse)
    run_sequence(recipe, until=1)
    run_sequence(recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"told": "never"})}))
    assert not (recipe.run_path / "eval" / "told-02").exists()
    sets.asked.clear()
    run_sequence(recipe)
    # T0 alone answered its questions after its own stage.
    expected = [("T1", 3), ("T1", 4)] if reuse else [("T0", 3), ("T0", 4), ("T1", 3), ("T1", 4)]
    assert sorted(sets.asked) == expected
    sets.asked.clear()
    before = {path: path.read_bytes() for path in (recipe.run_path / "eval").glob("*/*")}
    matrix = evaluate_run(recipe.run_path)
    assert not sets.asked and matrix["told"][1] == [100.0, 100.0]
    assert {path: path.read_bytes() for path in (recipe.run_path / "eval").glob("*/*")} == before


def test_a_stop_while_the_task_is_told_keeps_the_answers(stealing: Path, tmp_path: Path, sets: Sets) -> None:
    recipe = stealing_recipe(stealing, tmp_path)
    sets.stop_at = ("T1", 3, 1)
    with pytest.raises(Interrupted, match="with 4 of 5 answers"):
        run_sequence(recipe)
    kept = json.loads((recipe.run_path / "eval" / "told-02" / "T1.unfinished.json").read_text())["answers"]
    assert [identity for identity, *_ in kept] == ["3"]  # the others are in the routed predictions
    sets.stop_at = None
    sets.asked.clear()
    matrix = run_sequence(recipe)
    assert sets.asked == [("T1", 4)] and matrix["told"][1] == [100.0, 100.0]
    assert not list(recipe.run_path.rglob("*unfinished*"))


def test_changed_predictions_are_told_again(stealing: Path, tmp_path: Path, sets: Sets) -> None:
    recipe = stealing_recipe(stealing, tmp_path)
    run_sequence(recipe)
    folder = recipe.run_path / "eval"
    for file in (folder / "told-02" / "T0.jsonl", folder / "after-02" / "T1.jsonl"):
        file.write_text(file.read_text().replace("set T", "set X"))
    sets.asked.clear()
    assert run_sequence(recipe)["told"][1] == [100.0, 100.0]
    assert by_hand(recipe.run_path, "T0") == by_hand(recipe.run_path, "T1") == (100.0, 60.0)


def test_rows_that_were_measured_stay_in_the_matrix(stealing: Path, tmp_path: Path, sets: Sets) -> None:
    recipe = stealing_recipe(stealing, tmp_path)
    assert run_sequence(recipe, until=1)["told"] == [[100.0, None]]
    sets.asked.clear()
    never = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"told": "never"})})
    matrix = run_sequence(never)
    assert matrix["told"] == [[100.0, None], None] and "told" not in matrix["metrics"]
    stages = stealing_recipe(stealing, tmp_path / "each", evaluate__told="stages")
    assert run_sequence(stages)["told"] == [[100.0, None], [100.0, 100.0]]


def test_the_tracker_gets_the_scores_and_what_routing_costs(
    stealing: Path, tmp_path: Path, sets: Sets, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: dict[tuple[str, int], float | None] = {}

    class Kept(NullTracker):
        def metrics(self, values: Mapping[str, float | None], step: int) -> None:
            logged.update({(name, step): value for name, value in values.items()})

    monkeypatch.setattr("pipeline.sequence.run.make_tracker", lambda *_: Kept())
    run_sequence(stealing_recipe(stealing, tmp_path))
    own = ("told", "routing_loss")
    costs = {name: value for (name, step), value in logged.items() if step == 2 and name.startswith(own)}
    assert costs == {
        **{"told": 100.0, "told.T0": 100.0, "told.T1": 100.0},
        **{"routing_loss": 40.0, "routing_loss.T0": 40.0, "routing_loss.T1": 40.0},
    }
    assert not any(name.startswith("routing.conf") for name, _ in logged)


@pytest.mark.gloo
def test_two_ranks_tell_what_one_tells(stealing: Path, tmp_path: Path) -> None:
    runs = []
    for ranks in (1, 2):
        recipe = stealing_recipe(stealing, tmp_path / str(ranks))
        recipe.dump_yaml(tmp_path / f"{ranks}.yaml")
        torchrun(["-m", "pipeline", "run", str(tmp_path / f"{ranks}.yaml")], ranks, 300)
        runs.append(recipe.run_path)
    matrices = [json.loads((run / "matrix.json").read_text()) for run in runs]
    assert matrices[0]["told"] == matrices[1]["told"] and matrices[0]["told"][0] is None
    for task in QUESTIONS:
        one, two = (lines(run / "eval" / "told-02" / f"{task}.jsonl") for run in runs)
        assert [line["selected"] for line in one] == [line["selected"] for line in two] == [[task]] * 2
        assert [line["id"] for line in one] == [line["id"] for line in two] == ["3", "4"]


@pytest.mark.parametrize("method", ["independent", "sequential", "joint"])
def test_methods_that_compare_no_scores_have_nothing_to_tell(
    stealing: Path, tmp_path: Path, sets: Sets, method: str
) -> None:
    matrix = run_sequence(stealing_recipe(stealing, tmp_path, method={"name": method, "prompt_length": 2}))
    assert "told" not in matrix and "told" not in matrix["metrics"]
    assert read_run(next(tmp_path.iterdir())).told_scores is None


def test_the_report_shows_what_routing_costs(stealing: Path, tmp_path: Path, sets: Sets) -> None:
    recipe = stealing_recipe(stealing, tmp_path)
    run_sequence(recipe)
    text = write_report(recipe.run_path).read_text("utf-8")
    assert "T0 taken by T1: 40.0 % (2 samples), score 0.0, with the task told 100.0" in text
    assert text.count("<dt>T0 first ✓</dt><dd><code>set T0</code></dd>") == 2
    assert text.count("<dt>T1 first</dt><dd><code>set T1</code></dd>") == 2
    assert text.count("data:image/png;base64,") >= 4  # the pictures of the misrouted samples


def test_a_second_task_that_is_trained_anew_is_told_anew(stealing: Path, tmp_path: Path, sets: Sets) -> None:
    recipe = stealing_recipe(stealing, tmp_path)
    run_sequence(recipe)
    shutil.rmtree(recipe.run_path / "stages" / "02-T1")
    run_sequence(recipe, stages="train")
    assert not (recipe.run_path / "eval" / "told-02").exists()
