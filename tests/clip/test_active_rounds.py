"""The protocol active as a run: rounds, their state, no leak of labels or test images, and resuming inside a round."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_prep.benchmark import prepare_benchmark
from pipeline.clip.active.oracle import SplitOracle
from pipeline.clip.benchmark.checkpoint import load_prompts
from pipeline.clip.benchmark.evaluate import TestImages
from pipeline.clip.benchmark.run import run_benchmark
from pipeline.clip.learning.model import PromptedCLIP
from pipeline.clip.recipe import ClipRecipe, clip_recipe
from pipeline.config.base import TrackingConfig
from pipeline.errors import Interrupted, UserError
from pipeline.files.atomic import sha256
from tests.clip.project import NAMES, fields, make_project
from tests.processes import torchrun
from tests.stopping import signal_in_forward

POOL, LABELS, ROUNDS = 36, 4, 3
COOP: dict[str, Any] = {"method": "coop", "options": {"length": 2}, "train": {"augment": "none"}}
BADGE = {"name": "badge-pcb", **COOP, "per_class": True, "acquire": "badge", "balance": "pcb"}
ENTROPY = {"name": "entropy", **COOP, "acquire": "entropy"}
CBSQ = {"name": "cb-sq", **COOP, "acquire": "class_guided", "free_labels": True}
MAPLE = {"name": "maple", "options": {"depth": 2}, "acquire": "coreset", "balance": "pcb_released"}
ACTIVE = {"rounds": ROUNDS, "labels_per_round": LABELS, "candidates": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_project(tmp_path_factory.mktemp("project"))
    prepare_benchmark(make(folder, folder, "prepare", BADGE), progress=False)
    return folder


def make(folder: Path, tmp_path: Path, name: str, *methods: Any, **active: Any) -> ClipRecipe:
    return clip_recipe(
        fields(
            folder,
            *methods,
            name=name,
            seeds=[1],
            run_dir=str(tmp_path / name),
            data={"protocol": "active", "shots": None},
            active=ACTIVE | active,
            train={"epochs": 2, "save_minutes": None},
        ),
        name,
    )


def selections(run: Path, method: str) -> list[dict[str, Any]]:
    files = sorted((run / "units" / f"{method}-toys-s1" / "rounds").glob("*/selection.json"))
    return [json.loads(file.read_text()) for file in files]


@pytest.fixture(scope="module")
def done(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of every kind of row; the oracle refuses an image that is asked twice."""
    recipe = make(
        folder,
        tmp_path_factory.mktemp("runs"),
        "rounds",
        "zero_shot",
        BADGE,
        ENTROPY,
        CBSQ,
        MAPLE,
        {"name": "all", **COOP, "acquire": "all"},
    )
    run_benchmark(recipe)
    return recipe.run_path


def test_every_round_has_results_and_what_was_labelled(done: Path) -> None:
    content = json.loads((done / "results.json").read_text())
    lines = {line["method"]: line for line in content["lines"]}
    assert list(lines["all"]["groups"]) == list(lines["zero_shot"]["groups"]) == ["all"]
    for method in ("badge-pcb", "entropy", "cb-sq", "maple"):
        assert list(lines[method]["groups"]) == ["round1", "round2", "round3"]
        (unit,) = (unit for unit in content["units"] if unit["method"] == method)
        assert [facts["labels"] for facts in unit["rounds"]] == [4, 8, 12]
        picked = [row for selection in selections(done, method) for row in selection["rows"]]
        assert len(set(picked)) == len(picked) == LABELS * ROUNDS
        free = [len(selection["free"]) for selection in selections(done, method)]
        assert unit["rounds"][-1]["paid"] == LABELS * ROUNDS - sum(free)
        assert free[0] == 0 and (method == "cb-sq" or not any(free))
        accuracies = [group["accuracy"] for group in unit["groups"].values()]
        assert min(accuracies) <= lines[method]["area"]["mean"] <= max(accuracies)
    page = (done / "report.html").read_text()
    assert all(part in page for part in ("round3", "Accuracy over the labels paid", '<table id="labels">', "4 8 12"))


def test_a_finished_unit_holds_the_prompts_of_its_last_round(done: Path) -> None:
    unit = done / "units" / "badge-pcb-toys-s1"
    found, last = load_prompts(unit), load_prompts(unit / "rounds" / "03" / "learned")
    assert found is not None and last is not None
    assert all((found.values[name] == value).all() for name, value in last.values.items())
    assert (found.meta["images"], found.meta["classes"]) == (LABELS * ROUNDS, list(NAMES))


def test_the_first_round_is_the_released_draw(done: Path) -> None:
    import random

    for method in ("badge-pcb", "entropy", "maple"):
        assert selections(done, method)[0]["rows"] == random.Random(1).sample(range(POOL), LABELS)


def test_only_labels_of_picked_images_are_read_and_no_test_image(
    folder: Path, tmp_path: Path, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels that were not asked for are other ones, so are all of the test split, whose images cannot be read."""
    asked: list[int] = []
    answers = SplitOracle.answers
    told: dict[int, int] = {}
    for method in ("badge-pcb", "cb-sq"):
        for selection in selections(done, method):
            asked_then = [row for row in selection["rows"] if row not in selection["free"]]
            told |= dict.fromkeys(asked_then, 0)

    def only_asked(self: SplitOracle, rows: Sequence[int]) -> list[int]:
        assert set(rows) <= set(told), "a row was asked that the undisturbed run did not ask"
        asked.extend(rows)
        return answers(self, rows)

    monkeypatch.setattr(SplitOracle, "answers", only_asked)
    shutil.copytree(folder / "prepared", tmp_path / "poisoned")
    file = tmp_path / "poisoned" / "toys" / "classes.json"
    classes = json.loads(file.read_text())
    wrong = [(label + 1) % len(NAMES) for label in classes["train"]]
    classes["train"] = [right if row in told else wrong[row] for row, right in enumerate(classes["train"])]
    classes["test"] = list(reversed(classes["test"]))
    assert sum(a == b for a, b in zip(classes["train"], wrong, strict=True)) > POOL // 3
    file.write_text(json.dumps(classes))
    recipe = make(folder, tmp_path, "blind", BADGE, CBSQ)
    data = recipe.data.model_copy(update={"prepared": str(tmp_path / "poisoned")})
    recipe = recipe.model_copy(update={"data": data})
    read = TestImages.pixel_batches

    def not_the_test_split(self: TestImages, rows: list[int]) -> Any:
        assert not str(self._pixels.shards.folder).endswith("test"), "test images were read"
        return read(self, rows)

    monkeypatch.setattr(TestImages, "pixel_batches", not_the_test_split)
    run_benchmark(recipe, evaluate=False)
    for method in ("badge-pcb", "cb-sq"):
        assert selections(recipe.run_path, method) == selections(done, method)
    free = sum(len(selection["free"]) for selection in selections(done, "cb-sq"))
    assert len(asked) == 2 * LABELS * ROUNDS - free


def test_the_tracker_has_a_score_for_each_number_of_labels_paid(folder: Path, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    recipe = make(folder, tmp_path, "tracked", CBSQ)
    recipe = recipe.model_copy(update={"tracking": TrackingConfig(uri=uri, registry=False)})
    run_benchmark(recipe)
    (unit,) = json.loads((recipe.run_path / "results.json").read_text())["units"]
    client = MlflowClient(uri)
    (experiment,) = [found for found in client.search_experiments() if found.name == recipe.name]
    runs = {run.info.run_name: run.info.run_id for run in client.search_runs([experiment.experiment_id])}
    run = next(identity for name, identity in runs.items() if "cb-sq-toys-s1" in name)
    found = {
        metric: sorted((entry.step, round(entry.value, 6)) for entry in client.get_metric_history(run, metric))
        for metric in ("accuracy_by_labels", "classes_without_label", "round")
    }
    paid = [facts["paid"] for facts in unit["rounds"]]
    accuracies = [round(group["accuracy"], 6) for group in unit["groups"].values()]
    without = [facts["classes_without"] for facts in unit["rounds"]]
    assert found["accuracy_by_labels"] == sorted(zip(paid, accuracies, strict=True))
    assert found["classes_without_label"] == sorted(zip(paid, without, strict=True))
    assert found["round"] == list(zip(paid, [1, 2, 3], strict=True))


@pytest.mark.parametrize("forward", [3, 6])
def test_a_stopped_round_goes_on_bit_for_bit(folder: Path, tmp_path: Path, done: Path, forward: int) -> None:
    """Of 1, 2 and 3 steps per epoch in two epochs; the third and the sixth step are in rounds two and three."""
    stopped = make(folder, tmp_path, "stopped", BADGE)
    calls = {3: 3, 6: 7}[forward]
    with signal_in_forward(PromptedCLIP, calls), pytest.raises(Interrupted):
        run_benchmark(stopped)
    unit = tmp_path / "stopped" / "units" / "badge-pcb-toys-s1.unfinished"
    assert (unit / "rounds" / "01" / "learned" / "COMPLETE").is_file()
    run_benchmark(stopped)
    assert selections(stopped.run_path, "badge-pcb") == selections(done, "badge-pcb")
    for number in ("01", "02", "03"):
        place = Path("units") / "badge-pcb-toys-s1" / "rounds" / number / "learned"
        assert sha256(stopped.run_path / place / "prompts.safetensors") == sha256(done / place / "prompts.safetensors")
        assert (stopped.run_path / place / "result.json").read_text() == (done / place / "result.json").read_text()


def test_a_selection_of_another_pool_is_refused(folder: Path, tmp_path: Path) -> None:
    recipe = make(folder, tmp_path, "other", ENTROPY)
    with signal_in_forward(PromptedCLIP, 3), pytest.raises(Interrupted):
        run_benchmark(recipe)
    file = tmp_path / "other/units/entropy-toys-s1.unfinished/rounds/01/selection.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pool": "another"}))
    with pytest.raises(UserError, match="chosen from other images or classes"):
        run_benchmark(recipe)
    file.write_text("{")
    with pytest.raises(UserError, match=r"selection\.json cannot be read"):
        run_benchmark(recipe)


@pytest.mark.gloo
@pytest.mark.slow
def test_two_ranks_select_as_one(folder: Path, tmp_path: Path, done: Path) -> None:
    recipes = [make(folder, tmp_path, "ranks", BADGE, MAPLE).model_dump(mode="json")]
    (tmp_path / "job.json").write_text(json.dumps({"recipes": recipes}))
    torchrun(["-m", "tests.clip.worlds", str(tmp_path / "job.json")], 2, 300)
    for method in ("badge-pcb", "maple"):
        found, wanted = selections(tmp_path / "ranks", method), selections(done, method)
        assert [selection["rows"] for selection in found] == [selection["rows"] for selection in wanted]


@pytest.mark.parametrize(
    ("active", "row", "said"),
    [
        ({"rounds": 10}, ENTROPY, "10 rounds of 4 labels are more than the 36 images.*at most 9"),
        ({"candidates": 0.1}, BADGE, "are 3 candidates, fewer than the 4 labels.*at least 0.112"),
        ({"rounds": 8}, CBSQ, "needs 44 clusters of the 36 images"),
    ],
)
def test_a_pool_that_is_too_small_is_refused(
    folder: Path, tmp_path: Path, active: dict[str, Any], row: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        run_benchmark(make(folder, tmp_path, "small", row, **active))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"name": "coop"}, "coop does not say in acquire"),
        ({"name": "zero_shot", "acquire": "random"}, "learns nothing, so it needs no labels"),
        ({**ENTROPY, "acquire": "random", "balance": "pcb"}, "leaves nothing to choose from"),
        ({**CBSQ, "balance": "pcb"}, "leaves nothing to choose from"),
        ({**ENTROPY, "free_labels": True}, "belong to acquire: class_guided"),
        ({**ENTROPY, "badge": "released"}, "belongs to acquire: badge"),
        ({"name": "cocoop", "acquire": "class_guided"}, "other text features for each image"),
        ({**ENTROPY, "acquire": "entropie"}, "acquire: found 'entropie', expected one of random, entropy"),
    ],
)
def test_contradictions_of_a_row_are_said(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        make(tmp_path, tmp_path, "wrong", row)


def test_the_section_and_its_fields_belong_to_the_protocol(tmp_path: Path) -> None:
    for data, changes, said in (
        ({"protocol": "active"}, {}, "set data.shots to null"),
        ({}, {"active": {}}, "belongs to the protocol active"),
        ({"protocol": "active", "shots": None}, {"active": {"rounds": 0}}, "rounds"),
        ({"protocol": "active", "shots": None}, {"active": {"candidates": 1.5}}, "candidates"),
    ):
        with pytest.raises(UserError, match=said):
            clip_recipe(fields(tmp_path, ENTROPY, data=data, **changes), "wrong")
    with pytest.raises(UserError, match="entropy has acquire, which belong to the protocol active"):
        clip_recipe(fields(tmp_path, ENTROPY), "wrong")


def test_check_says_what_a_pool_cannot_give_and_counts_the_steps_of_all_rounds(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.check.clip import check_benchmark

    content = make(folder, tmp_path, "checked", BADGE, CBSQ, rounds=8).model_dump(mode="json")
    file = tmp_path / "checked.yaml"
    file.write_text(yaml.safe_dump(content))
    findings = check_benchmark(str(file), [])
    assert "cb-sq, toys: the last round needs 44 clusters" in str(findings.problems["data"])
    findings = check_benchmark(str(file), ["active.rounds=3"])
    assert not findings.problems, findings.problems
