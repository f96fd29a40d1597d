"""A whole benchmark from the command line: its files, its numbers, MLflow, going on, and what wrong input says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from pipeline.cli.commands import app
from pipeline.clip.benchmark.checkpoint import classifier_from, load_prompts
from pipeline.clip.learning.protocol import epoch_rates
from pipeline.clip.towers.backbone import load_backbone
from pipeline.errors import EXIT_OK, UserError
from pipeline.report.listing import list_runs
from tests.clip.project import NAMES, SEEDS, SHOTS, fields, make_project, recipe_file, said, save_model
from tests.clip.tiny import images
from tests.processes import program
from tests.report.test_report import Page

EPOCHS, BATCH = 2, 4
COOP = {"name": "coop", "options": {"length": 2}, "train": {"augment": "none"}}
MPL = {"name": "mpl", "options": {"depth": 3}, "average": {"mean": 2}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three methods with two seeds, tracked."""
    folder = make_project(tmp_path_factory.mktemp("project"))
    tracking = {"uri": f"sqlite:///{folder / 'mlflow.db'}"}
    recipe_file(folder, "zero_shot", COOP, MPL, tracking=tracking)
    done = program(folder, "run", "tiny.yaml")
    assert done.returncode == EXIT_OK, done.stderr[-3000:]
    (folder / "printed").write_text(done.stdout)
    return folder


def units(folder: Path) -> Path:
    return folder / "runs" / "tiny" / "units"


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "runs" / "tiny" / "results.json").read_text())


def test_every_method_has_a_line_and_what_learns_has_a_row_per_seed(folder: Path) -> None:
    found = results(folder)
    assert [line["method"] for line in found["lines"]] == ["zero_shot", "coop", "mpl"]
    rows = [(unit["method"], unit["seed"]) for unit in found["units"]]
    assert rows == [("zero_shot", 1), *((m, s) for m in ("coop", "mpl") for s in SEEDS)]
    for unit in found["units"]:
        assert set(unit["groups"]) == {"base", "new"}
        assert all(sum(counts["total"]) == 12 and len(counts["right"]) == 3 for counts in unit["groups"].values())
    assert found["lines"][1]["groups"]["base"]["seeds"] == len(SEEDS)
    printed = (folder / "printed").read_text()
    assert "HM of seeds" in printed and "±" in printed


def test_steps_and_rates_are_those_of_the_protocol(folder: Path) -> None:
    rates = epoch_rates(0.01, EPOCHS)
    per_epoch = len(NAMES) // 2 * SHOTS // BATCH
    lines = [json.loads(line) for line in (units(folder) / "mpl-toys-s1" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, EPOCHS * per_epoch + 1))
    assert [line["lr"] for line in lines] == pytest.approx([rate for rate in rates for _ in range(per_epoch)])


def test_checkpoints_hold_prompts_alone_and_say_what_they_are(folder: Path) -> None:
    learned = load_prompts(units(folder) / "coop-toys-s2")
    assert learned is not None
    assert set(learned.values) == {"ctx"}
    assert (learned.meta["method"], learned.meta["seed"], learned.meta["group"]) == ("coop", 2, "base")
    assert learned.meta["classes"] == list(NAMES[:3])
    assert sum(file.stat().st_size for file in (units(folder) / "coop-toys-s2").iterdir()) < 20_000


def test_seeds_learn_different_prompts(folder: Path) -> None:
    first, second = (load_file(units(folder) / f"coop-toys-s{seed}" / "prompts.safetensors") for seed in SEEDS)
    assert not torch.equal(first["ctx"], second["ctx"])


def test_a_checkpoint_moves_to_another_class_list(folder: Path) -> None:
    backbone, tokenizer = load_backbone(folder / "model")
    unit, words = units(folder) / "mpl-toys-s1", backbone.words(tokenizer)
    with torch.no_grad():
        few = classifier_from(unit, backbone, words, NAMES[:3]).logits(images())
        many = classifier_from(unit, backbone, words, ["pier", *NAMES[:3]]).logits(images())
    torch.testing.assert_close(many[:, 1:], few, atol=1e-5, rtol=1e-5)


def test_a_checkpoint_of_another_backbone_or_a_damaged_one_is_refused(folder: Path, tmp_path: Path) -> None:
    unit = units(folder) / "mpl-toys-s1"
    other, tokenizer = load_backbone(save_model(tmp_path / "model", text_width=16))
    with pytest.raises(UserError, match=r"this backbone needs .* Give that model"):
        classifier_from(unit, other, other.words(tokenizer), NAMES)
    copy = tmp_path / "unit"
    shutil.copytree(unit, copy)
    save_file({"ctx": torch.zeros(1)}, copy / "prompts.safetensors")
    with pytest.raises(UserError, match=r"not the file that meta.json describes"):
        classifier_from(copy, other, other.words(tokenizer), NAMES)
    with pytest.raises(UserError, match="holds no finished prompts"):
        classifier_from(tmp_path, other, other.words(tokenizer), NAMES)


def test_mlflow_has_the_benchmark_and_a_child_for_each_method_dataset_and_seed(folder: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    parent = next(run for run in runs if "mlflow.parentRunId" not in run.data.tags)
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == 5 == len(runs) - 1
    child = next(run for run in children if run.info.run_name.endswith("mpl-toys-s2"))
    assert {"loss", "accuracy.base", "accuracy.new"} <= set(child.data.metrics)
    assert child.data.params["seed"] == "2" and child.data.params["dataset"] == "toys"
    assert parent.data.metrics["mpl.toys.base"] == pytest.approx(results(folder)["lines"][2]["groups"]["base"]["mean"])


def test_the_report_is_one_page_with_every_row(folder: Path) -> None:
    drawn = (folder / "runs" / "tiny" / "report.html").read_text()
    assert "base_to_new, done, 5 of 5 units" in drawn  # by the run itself, at its end
    assert 'class="average"' not in drawn  # there is one dataset
    done = CliRunner().invoke(app, ["report", str(folder / "runs" / "tiny")])
    assert done.exit_code == EXIT_OK
    page = (folder / "runs" / "tiny" / "report.html").read_text()
    assert all(word in page for word in ("zero_shot", "mpl", "HM of seeds", "red_panda", "mpl-toys-s2"))
    assert all(link.startswith(("#", "data:")) for link in Page(page).links)


def test_a_run_goes_on_at_the_units_that_are_missing(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    path = copy / "runs" / "tiny" / "config.yaml"
    moved = path.read_text().replace(str(folder), str(copy))
    path.write_text(moved)
    (copy / "tiny.yaml").write_text(moved)
    before = results(copy)
    shutil.rmtree(units(copy) / "mpl-toys-s2")
    (units(copy) / "coop-toys-s1" / "result.json").unlink()
    kept = units(copy) / "mpl-toys-s1" / "prompts.safetensors", units(copy) / "coop-toys-s1" / "prompts.safetensors"
    times = [file.stat().st_mtime_ns for file in kept]
    done = program(copy, "run", "tiny.yaml", "--set", "tracking.enabled=false", "--json")
    assert done.returncode == EXIT_OK, done.stderr[-3000:]
    assert [file.stat().st_mtime_ns for file in kept] == times
    assert json.loads(done.stdout.splitlines()[-1])["units"] == before["units"]


def test_the_same_folder_with_another_recipe_is_refused(folder: Path) -> None:
    changed = str(recipe_file(folder, COOP, name="other", run_dir=str(folder / "runs" / "tiny")))
    assert "belongs to another recipe" in said("run", changed)


def test_check_explains_what_to_download_and_where_it_goes(folder: Path) -> None:
    data = {"datasets": ["dtd", "imagenet"], "prepare_first": False, "prepared": str(folder / "none")}
    changed = str(recipe_file(folder, COOP, name="published", data=data))
    found = said("check", changed)
    assert f"dtd: the folder {folder / 'data' / 'dtd'} is missing. Download https://www.robots.ox.ac.uk" in found
    assert "split_zhou_DescribableTextures.json" in found
    assert "https://image-net.org" in found
    assert "datasets 'dtd', 'imagenet' are not prepared" in found


def test_check_names_the_block_where_a_schedule_breaks(folder: Path) -> None:
    methods = [{"name": "mpl", "options": {"remove": 2, "depth": 3}}]
    assert "Block 1 of the vision tower would remove 2 prompts" in said(
        "check", str(recipe_file(folder, *methods, name="r"))
    )


def test_a_benchmark_is_no_sequence(folder: Path) -> None:
    run = str(folder / "runs" / "tiny")
    assert "is a benchmark on CLIP, where --question means nothing" in said("predict", run, "--question", "what?")
    assert "expected the run of a task sequence" in said("export", run, str(folder / "adapter"))
    (row,) = list_runs(folder / "runs")
    assert (row["method"], row["status"], row["stages"]) == ("benchmark", "done", "5/5")
    assert yaml.safe_load((folder / "runs" / "tiny" / "config.yaml").read_text())["kind"] == "clip"
    assert fields(folder)["kind"] == "clip"
