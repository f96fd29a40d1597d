"""A search before the training of units: what it finds, shares, keeps, and learns from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import CLIPModel
from typer.testing import CliRunner

from data_prep.benchmark import prepare_benchmark
from pipeline.cli.commands import app
from pipeline.clip.benchmark.checkpoint import classifier_from
from pipeline.clip.benchmark.run import run_benchmark
from pipeline.clip.images.prepared import ClassGroup, ClassList, PreparedDataset
from pipeline.clip.learning.model import PromptedCLIP
from pipeline.clip.search.choice import arrange
from pipeline.clip.search.validation import hold_out
from pipeline.clip.search_space import Arrangement
from pipeline.clip.towers.backbone import Backbone
from pipeline.config.paths import PROJECT
from pipeline.console.progress import SPEEDS
from pipeline.errors import EXIT_OK, Interrupted
from tests.clip import project
from tests.clip.project import make_project, recipe, recipe_file, said
from tests.clip.tiny import byte_tokenizer
from tests.stopping import signal_in_forward

SEARCH: dict[str, Any] = {"options": [0, 1, 2], "epochs": 2, "lr": 0.05, "alpha_lr": 0.05, "validation_batch": 5}
DPL: dict[str, Any] = {"name": "dpl", "search": SEARCH}
LIKE: dict[str, Any] = {
    "name": "dpl-kd",
    "method": "dpl",
    "search": {"like": "dpl"},
    "consistency": {"text": 0, "image": 0, "logits": 1, "templates": ["a {}."]},
}
CONTROLS: list[dict[str, Any]] = [
    {"name": how, "method": "dpl", "search": {"like": "dpl", "lengths": how}} for how in ("shuffled", "even")
]
ONE: dict[str, Any] = {"seeds": [1]}
SEARCH_STEPS, STEPS = 6, 6  # 2 epochs each of 12 images in batches of 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and prepared data with two validation images per class."""
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as changed:
        changed.setitem(project.IMAGES, "val", 2)
        make_project(folder)
    prepare_benchmark(recipe(folder, DPL), progress=False)
    return folder


def searches(run: Path) -> list[Path]:
    return sorted((run / "searches").iterdir())


def found(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "search.json").read_text())


def test_rows_share_a_search_and_train_with_its_lengths(folder: Path, tmp_path: Path) -> None:
    rows = (DPL, LIKE, {**DPL, "name": "same", "method": "dpl"}, *CONTROLS)
    made = recipe(folder, *rows, run_dir=str(tmp_path / "run"), **ONE)
    run_benchmark(made)
    (once,) = searches(made.run_path)
    search = found(once)
    assert search["validation"] == {"images": 6, "held_out_of_training": False}
    assert search["steps"] == SEARCH_STEPS == len((once / "metrics.jsonl").read_text().splitlines())
    assert not (once / "resume").exists()
    for tower in ("text", "vision"):
        assert [len(search[what][tower]) for what in ("lengths", "gaps", "alphas")] == [3, 3, 2]
        best = torch.tensor(search["alphas"][tower][-1]).argmax(dim=1).tolist()
        assert search["lengths"][tower] == best
    for row in ("dpl", "dpl-kd", "same"):
        unit = made.run_path / "units" / f"{row}-toys-s1"
        assert found(unit) == search
        values, meta = load_file(unit / "prompts.safetensors"), json.loads((unit / "meta.json").read_text())
        wanted = {f"ctx_{t}.{b}": n for t in search["lengths"] for b, n in enumerate(search["lengths"][t]) if n}
        assert {name: len(value) for name, value in values.items()} == wanted
        assert meta["options"]["text"] == search["lengths"]["text"]
        backbone = Backbone(CLIPModel.from_pretrained(folder / "model"))
        learned = classifier_from(unit, backbone, backbone.words(byte_tokenizer()), ["desert", "glacier"])
        assert learned.logits(torch.zeros(2, 3, 16, 16)).shape == (2, 2)
    controls: tuple[Arrangement, ...] = ("shuffled", "even")
    for how in controls:
        unit = made.run_path / "units" / f"{how}-toys-s1"
        assert found(unit) == search
        arranged = arrange(search["lengths"], how, 1)
        options = json.loads((unit / "meta.json").read_text())["options"]
        assert {tower: options[tower] for tower in arranged} == arranged
        wanted = {f"ctx_{t}.{b}": n for t, lengths in arranged.items() for b, n in enumerate(lengths) if n}
        assert {name: len(value) for name, value in load_file(unit / "prompts.safetensors").items()} == wanted
    before = json.loads((made.run_path / "results.json").read_text())
    (made.run_path / "units" / "dpl-toys-s1" / "result.json").unlink()
    run_benchmark(made)  # evaluates from the checkpoint alone
    assert json.loads((made.run_path / "results.json").read_text()) == before


def outcome(run: Path) -> list[Any]:
    """All that was computed, without what depends on the machine's speed."""
    (search,) = searches(run)
    unit = run / "units" / "dpl-toys-s1"
    logs = [json.loads(line) for part in (search, unit) for line in (part / "metrics.jsonl").read_text().splitlines()]
    kept = [{name: value for name, value in line.items() if name not in SPEEDS} for line in logs]
    values = {name: value.tolist() for name, value in load_file(unit / "prompts.safetensors").items()}
    return [kept, values, {k: v for k, v in found(search).items() if k != "seconds"}]


@pytest.mark.parametrize(
    ("calls", "micro"),
    [
        pytest.param(2 * 2, None, id="in-the-search"),
        pytest.param(3 * 4, 2, id="in-the-search-in-micro-batches"),
        pytest.param(2 * SEARCH_STEPS + 3, None, id="in-the-training"),
    ],
)
def test_a_stopped_search_goes_on_bit_for_bit(folder: Path, tmp_path: Path, calls: int, micro: int | None) -> None:
    whole, stopped = (
        recipe(folder, DPL, run_dir=str(tmp_path / name), train={"save_minutes": None, "micro_batch": micro}, **ONE)
        for name in ("whole", "stopped")
    )
    run_benchmark(whole)
    with signal_in_forward(PromptedCLIP, calls), pytest.raises(Interrupted):
        run_benchmark(stopped)
    run_benchmark(stopped)
    assert outcome(stopped.run_path) == outcome(whole.run_path)


DIES = """
import os, sys
from pipeline.clip.learning.model import PromptedCLIP
from pipeline.cli.commands import app
forward, left = PromptedCLIP.forward, [int(sys.argv.pop(1))]
def dying(self, *arguments):
    left[0] -= 1
    return forward(self, *arguments) if left[0] else os._exit(9)  # as if killed: nothing is said or tidied
PromptedCLIP.forward = dying
app()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("calls", "unfinished"),
    [
        pytest.param(2 * 4, "searches", id="in-the-search"),
        pytest.param(2 * SEARCH_STEPS + 4, "units", id="in-the-training"),
    ],
)
def test_a_killed_run_goes_on_bit_for_bit(folder: Path, tmp_path: Path, calls: int, unfinished: str) -> None:
    train = {"save_steps": 1}
    whole = recipe(folder, DPL, run_dir=str(tmp_path / "whole"), train=train, **ONE)
    run_benchmark(whole)
    killed = recipe(folder, DPL, run_dir=str(tmp_path / "killed"), train=train, **ONE)
    file = tmp_path / "killed.yaml"
    file.write_text(yaml.safe_dump(killed.model_dump(mode="json")))
    done = subprocess.run(
        [sys.executable, "-c", DIES, str(calls), "run", str(file)], cwd=PROJECT, capture_output=True, timeout=300
    )
    assert done.returncode == 9, done.stderr[-2000:]
    (work,) = (killed.run_path / unfinished).glob("*.unfinished")
    assert sorted(path.name for path in (work / "resume").iterdir())[-1] == "step-00000003"
    run_benchmark(killed)
    assert outcome(killed.run_path) == outcome(whole.run_path)


def test_without_validation_images_some_training_images_are_held_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_project(tmp_path)
    made = recipe(folder, DPL, train={"epochs": 1}, **ONE)
    prepare_benchmark(made, progress=False)
    with caplog.at_level("WARNING"):
        run_benchmark(made)
    assert "validates on 6 of the 12 training images instead" in caplog.text
    (once,) = searches(made.run_path)
    assert found(once)["validation"] == {"images": 6, "held_out_of_training": True}
    assert json.loads((made.run_path / "units/dpl-toys-s1/meta.json").read_text())["images"] == 12


def test_held_out_images_are_the_last_of_each_class_and_at_most_half() -> None:
    group = ClassGroup(("a", "b", "c"), (5, 6, 7, 8, 9, 4), (0, 0, 0, 0, 0, 1))
    train, validation = hold_out(group, 4)
    assert (train.rows, validation.rows, validation.labels) == ((5, 6, 7, 4), (8, 9), (0, 0))
    assert not set(train.rows) & set(validation.rows)


def test_one_image_per_class_is_too_few_to_hold_any_out(tmp_path: Path) -> None:
    folder = make_project(tmp_path)
    file = str(recipe_file(folder, DPL, data={"shots": 1}, **ONE))
    sentence = "toys has no validation images, and one training image per class, so none can be held out"
    assert sentence in said("check", file)
    prepare_benchmark(recipe(folder, DPL, data={"shots": 1}, **ONE), progress=False)
    for verb in ("check", "run"):
        assert sentence in said(verb, file)


def checked(file: Path) -> dict[str, Any]:
    """What `check --json` finds, with exit code 0."""
    done = CliRunner().invoke(app, ["check", str(file), "--json"])
    assert done.exit_code == EXIT_OK, done.output
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("prepared", [False, True])
def test_check_says_what_a_search_validates_on(tmp_path: Path, prepared: bool) -> None:
    folder = make_project(tmp_path)
    rows = (DPL, LIKE)
    if prepared:
        prepare_benchmark(recipe(folder, *rows, **ONE), progress=False)
    found = checked(recipe_file(folder, *rows, **ONE))
    (warning,) = found["warnings"]["data"]
    assert "the search validates on 6 of the 12 training images instead" in warning
    assert "4 x 1 of 4: dpl, the search of dpl, dpl-kd" in found["ranks"]
    if prepared:
        assert found["steps"].splitlines() == ["dpl 6", "dpl-kd 6", "the search of dpl 6"]


@pytest.mark.parametrize("prepared", [False, True])
def test_check_counts_the_classes_without_a_validation_image(tmp_path: Path, prepared: bool) -> None:
    with pytest.MonkeyPatch.context() as changed:
        changed.setitem(project.IMAGES, "val", 2)
        folder = make_project(tmp_path)
    split = project.split_file(folder / "data")
    content = json.loads(split.read_text())
    content["val"] = [image for image in content["val"] if image[1] not in (0, 5)]  # one of the base classes, one new
    split.write_text(json.dumps(content))
    everything = {"data": {"protocol": "all_classes"}}
    for changes, told in (({}, "1 of the 3 classes of toys"), (everything, "2 of the 6 classes of toys")):
        if prepared:
            prepare_benchmark(recipe(folder, DPL, **ONE, **changes), progress=False)
        (warning,) = checked(recipe_file(folder, DPL, **ONE, **changes))["warnings"]["data"]
        assert f"{told} have no validation image" in warning


def test_a_search_that_chooses_nothing_is_zero_shot(folder: Path, tmp_path: Path) -> None:
    row = {**DPL, "search": {**SEARCH, "epochs": 1, "tie": 0.99}}
    made = recipe(folder, "zero_shot", row, run_dir=str(tmp_path / "run"), **ONE)
    zero_shot, nothing = run_benchmark(made)["units"]
    assert nothing["groups"] == zero_shot["groups"]


def test_validation_images_are_none_of_training_and_test(folder: Path) -> None:
    data = PreparedDataset(folder / "prepared" / "toys")
    assert data.val is not None and data.train is not None and data.test is not None
    chosen = data.validation_images(1, "base")
    assert chosen is not None
    ids = {data.val.ids[row] for row in chosen.rows}
    assert len(ids) == 6
    assert not ids & {*data.train.ids, *data.test.ids}


def test_other_recipes_keep_validation_images_and_do_not_make_them(folder: Path, tmp_path: Path) -> None:
    before = ClassList.read(folder / "prepared" / "toys")
    prepare_benchmark(recipe(folder, "zero_shot", {"name": "vpt", "options": {"depth": 1}}), progress=False)
    assert ClassList.read(folder / "prepared" / "toys") == before
    plain = make_project(tmp_path)
    prepare_benchmark(recipe(plain, {"name": "vpt", "options": {"depth": 1}}), progress=False)
    assert not (plain / "prepared" / "toys" / "val").exists()
    file = recipe_file(plain, DPL, data={"prepare_first": False})
    assert "was prepared without validation images of seed 1" in said("run", str(file))


def test_a_search_has_no_place_in_rounds_of_labels(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="search needs the few-shot images of a seed"):
        recipe(tmp_path, {**DPL, "acquire": "random"}, data={"protocol": "active", "shots": None})


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([{"name": "dpl", "search": {"options": [1, 2]}}], "expected 0 and one or more larger numbers"),
        ([{"name": "dpl", "search": {"options": [0]}}], "expected 0 and one or more larger numbers"),
        ([{"name": "dpl", "search": {"options": {"text": [0, 2, 2], "vision": [0, 1]}}}], "larger numbers, increasing"),
        ([{"name": "dpl", "search": {"options": [0, -1]}}], "larger numbers, increasing"),
        ([{"name": "dpl", "search": {"epochs": 0}}], "epochs"),
        ([{"name": "dpl", "search": {"alpha_lr": 0}}], "alpha_lr"),
        ([{"name": "dpl", "search": {"global_batch": 0}}], "global_batch"),
        ([{"name": "dpl", "search": {"validation_batch": 0}}], "validation_batch"),
        ([{"name": "dpl", "search": {"held_out": 0}}], "held_out"),
        ([{"name": "dpl", "search": {"tie": 1.0}}], "tie"),
        ([{**DPL, "options": {"text": 2}}], "the lengths that it would find"),
        ([{"name": "vpt", "search": {}}], "search belongs to dpl"),
        ([{**LIKE, "search": {"like": "dlp"}}, DPL], "names no row; .*Did you mean 'dpl'"),
        ([LIKE, DPL], "comes later or is the row itself"),
        (["zero_shot", {**LIKE, "search": {"like": "zero_shot"}}], "which has no search"),
        ([DPL, {**LIKE, "search": {"like": "dpl", "epochs": 3}}], "takes that row's search, so epochs cannot be set"),
    ],
)
def test_bad_searches_are_refused(tmp_path: Path, rows: list[Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        recipe(tmp_path, *rows)
