"""Wrong input to a benchmark is one sentence that says what was found, and exit code 2, before anything is trained."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from data_prep.benchmark import prepare_benchmark
from pipeline.cli.commands import app
from pipeline.clip.benchmark.checkpoint import classifier_from
from pipeline.clip.benchmark.run import run_benchmark
from pipeline.clip.towers.backbone import load_backbone
from pipeline.errors import EXIT_OK, EXIT_USER, UserError
from tests.clip.project import NAMES, make_project, recipe, recipe_file, said, save_dataset, split_file

COOP: dict[str, Any] = {"name": "coop", "options": {"length": 2}, "train": {"augment": "none"}}
PER_CLASS: dict[str, Any] = {**COOP, "per_class": True}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model and data that is not prepared."""
    return make_project(tmp_path)


def test_a_class_list_that_differs_from_the_checkpoints_method(folder: Path) -> None:
    file = str(recipe_file(folder, PER_CLASS))
    assert "learns a context for each class, which the other classes of base_to_new have none of" in said("run", file)
    everything: dict[str, Any] = {"data": {"protocol": "all_classes"}, "seeds": [1]}
    trained = recipe(folder, PER_CLASS, **everything)
    prepare_benchmark(trained, progress=False)
    run_benchmark(trained)
    backbone, tokenizer = load_backbone(folder / "model")
    unit, words = trained.run_path / "units" / "coop-toys-s1", backbone.words(tokenizer)
    assert classifier_from(unit, backbone, words, [f"other {name}" for name in NAMES])
    with pytest.raises(UserError, match="a context for each of 6 classes, but the class list has 4"):
        classifier_from(unit, backbone, words, NAMES[:4])


def test_processes_for_keys_that_a_benchmark_has_none_of(folder: Path) -> None:
    file = str(recipe_file(folder, COOP))
    sentence = said("prepare", file, "--gpus", "2")
    assert "is a benchmark, whose preparation computes no keys; leave --gpus out" in sentence
    assert not (folder / "prepared").exists()


def test_a_run_whose_classes_were_changed(folder: Path) -> None:
    file, trained = str(recipe_file(folder, COOP, seeds=[1])), recipe(folder, COOP, seeds=[1])
    prepare_benchmark(trained, progress=False)
    run_benchmark(trained, evaluate=False)
    split = split_file(folder / "data")
    split.write_text(split.read_text().replace("golf ball", "rugby ball"))
    shutil.rmtree(folder / "prepared")
    prepare_benchmark(trained, progress=False)
    assert "units/coop-toys-s1 was trained with another data" in said("run", file)


def test_a_split_file_that_names_absent_images(folder: Path) -> None:
    (folder / "data" / "toys" / "images" / "train-1-0.png").unlink()
    (folder / "data" / "toys" / "images" / "test-0-0.png").unlink()
    file = str(recipe_file(folder, COOP, data={"shots": 6}))
    for verb in ("prepare", "run", "check"):
        assert "test-0-0.png, train-1-0.png: the split names them, but they are not in" in said(verb, file)


def test_a_dataset_that_is_not_there(folder: Path) -> None:
    file = str(recipe_file(folder, COOP, data={"datasets": ["eurosat"]}))
    for verb in ("prepare", "check", "run"):
        assert "eurosat is missing. Download https://github.com/phelber/EuroSAT; its images go to" in said(verb, file)


def test_fewer_images_than_shots(folder: Path) -> None:
    file = str(recipe_file(folder, COOP, data={"shots": 7}))
    for verb in ("check", "prepare", "run"):
        assert "toys: 6 of the classes have fewer than 7 training images" in said(verb, file)


def test_words_with_fewer_tokens_than_vectors_are_said_before_anything_is_prepared(folder: Path) -> None:
    coop = {"name": "coop", "options": {"words": "a photo of a"}}  # of bytes, 12 tokens; the default length is 16
    found = said("check", str(recipe_file(folder, coop, "maple")))
    assert "methods.coop: The prompt is initialised from the words 'a photo of a', which are" in found
    assert "but has 16 vectors. Give more words or a prompt length of at most" in found
    assert not (folder / "prepared").exists()


def test_an_empty_class(folder: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("ant", "bee"):
            (tmp_path / "mine" / split / name).mkdir(parents=True)
    for file in (save_dataset(tmp_path) / "images").glob("*-0-*.png"):
        split = "train" if "train" in file.name else "test"
        shutil.copy(file, tmp_path / "mine" / split / "ant" / file.name)
    entry = {"name": "mine", "layout": "class_folders"}
    changed = recipe_file(folder, COOP, name="mine", data={"datasets": [entry], "root": str(tmp_path)})
    assert "bee holds no images. Add some, or remove the empty class" in said("prepare", str(changed))


def test_a_batch_larger_than_the_few_shot_set_is_said_with_the_steps_that_remain(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    big = {"name": "coop", "options": {"length": 2}, "train": {"global_batch": 64, "epochs": 3}}
    prepared = recipe(folder, big, seeds=[1])
    prepare_benchmark(prepared, progress=False)
    done = CliRunner().invoke(app, ["check", str(recipe_file(folder, big, seeds=[1])), "--json"])
    assert done.exit_code == EXIT_OK, done.output
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["steps"] == "coop 3"
    (warning,) = told["warnings"]["steps"]
    assert "the batch of 64 of coop is larger than the training set of toys (12 images, 3 steps in all)" in warning
    with caplog.at_level(logging.WARNING, logger="pipeline"):
        run_benchmark(prepared)
    assert "one step of 12 images, the whole training 3 steps. Set a smaller batch" in caplog.text
    log = prepared.run_path / "units" / "coop-toys-s1" / "metrics.jsonl"
    assert [json.loads(line)["step"] for line in log.open()] == [1, 2, 3]


def test_a_backbone_that_is_not_here(folder: Path) -> None:
    changed = str(recipe_file(folder, COOP, name="elsewhere", model={"path": "somebody/clip"}))
    assert "'somebody/clip' is not on this machine; run `hf download somebody/clip` where" in said("check", changed)


def test_an_unknown_backbone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    changed = str(recipe_file(folder, COOP, name="elsewhere", model={"path": "./nowhere"}))
    assert "'./nowhere' is not on this machine; run `hf download" in said("check", changed)
    config = folder / "resnet"
    config.mkdir(exist_ok=True)
    (config / "config.json").write_text(json.dumps({"model_type": "resnet"}))
    changed = str(recipe_file(folder, COOP, name="resnet", model={"path": str(config)}))
    assert "is a model of type 'resnet'; supported: clip, siglip" in said("check", changed)


@pytest.mark.parametrize(
    "units",
    [3, [3], [{"method": "a", "dataset": "d", "seed": 1, "groups": {"base": {"right": ["x"], "total": [1]}}}]],
    ids=["no list", "no unit", "no number"],
)
def test_damaged_results_are_a_sentence(tmp_path: Path, units: Any) -> None:
    (tmp_path / "config.yaml").write_text("kind: clip\n")
    content = {"protocol": "all_classes", "units": units, "lines": [], "averages": {}}
    (tmp_path / "results.json").write_text(json.dumps(content))
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert done.exit_code == EXIT_USER and "results.json is damaged" in done.stderr
