"""A Hub id in place of a folder is the only difference: the recipes for real models run on the cache alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_prep.own_task import NewTask, make_task
from data_prep.prepare import prepare
from pipeline.cli.commands import app
from pipeline.config.load import load_recipe
from pipeline.errors import EXIT_USER
from pipeline.hub import snapshots
from pipeline.sequence.run import run_sequence
from tests import tiny_clip
from tests.backbones.shrunk_models import COMMIT, as_cached, save_shrunk
from tests.tiny_clip import picture

pytestmark = pytest.mark.e2e

# One step of two samples, so that a step is what takes the time.
SMALL = [
    "model.dtype=float32",
    "train.steps=1",
    "train.global_batch=2",
    "train.micro_batch=2",
    "train.workers=0",
    "train.deepspeed=ds_configs/zero0.json",
    "evaluate.batch=4",
    "evaluate.zero_shot=false",
    "tracking.enabled=false",
]


@pytest.fixture
def machine(empty_machine: Path, tmp_path: Path) -> Path:
    """A working folder with a task of one's own, on a machine without a network; returns the Hub's cache."""
    (tmp_path / "photos").mkdir()
    for number in range(8):
        (tmp_path / "photos" / f"{number}.png").write_bytes(picture(number, size=(60 + 9 * number, 50)))
    rows = "".join(f"{number}.png,what is it?,thing {number % 3}\n" for number in range(8))
    (tmp_path / "mine.csv").write_text(f"image,question,answer\n{rows}")
    make_task(NewTask("Mine", tmp_path / "data" / "own", max_new_tokens=4), tmp_path / "photos", tmp_path / "mine.csv")
    return empty_machine


@pytest.mark.parametrize(
    "name",
    [
        "smolvlm_256m_own",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen25vl_3b_own", "llava15_7b_own")),
    ],
)
def test_a_hub_id_in_place_of_a_folder_is_the_only_difference(name: str, machine: Path, tmp_path: Path) -> None:
    shipped = load_recipe(name)
    model, clip = save_shrunk(tmp_path / "model", shipped.model.path), tiny_clip.save_clip(tmp_path / "clip")
    for path, folder in ((shipped.model.path, model), (shipped.keys.path, clip)):
        as_cached(machine, path, folder)
    folders = [f"model.path={model}", f"keys.path={clip}", "data.prepared=data/same"]
    runs = {}
    for kind, changes in {"hub": ["data.prepared=data/same"], "folder": folders}.items():
        recipe = load_recipe(name, [*SMALL, *changes, f"run_dir=runs/{kind}"])
        if kind == "hub":
            prepare(recipe, progress=False)
        run_sequence(recipe)
        runs[kind] = recipe.run_path
    same = ["stages/01-Mine/prompts.safetensors", "eval/after-01/Mine.jsonl"]
    for file in same:
        assert (runs["hub"] / file).read_bytes() == (runs["folder"] / file).read_bytes(), file
    matrices = [json.loads((run / "matrix.json").read_text("utf-8"))["accuracy"] for run in runs.values()]
    assert matrices[0] == matrices[1]
    answers = [json.loads(line) for line in (runs["hub"] / same[1]).read_text("utf-8").splitlines()]
    assert answers and all(line["selected"] == ["Mine"] for line in answers)
    meta = [json.loads((run / "stages" / "01-Mine" / "meta.json").read_text("utf-8")) for run in runs.values()]
    assert meta[0]["base_model"] == meta[1]["base_model"] and meta[0]["clip"] == meta[1]["clip"]
    assert snapshots.checkpoint(snapshots.Source(shipped.model.path)).commit == COMMIT


@pytest.mark.parametrize(
    ("verb", "missing"),
    [("prepare", "openai/clip-vit-base-patch32"), ("run", "HuggingFaceTB/SmolVLM-256M-Instruct")],
)
def test_with_no_network_and_nothing_in_the_cache_one_sentence_says_what_to_run(
    verb: str, missing: str, machine: Path
) -> None:
    done = CliRunner().invoke(app, [verb, "smolvlm_256m_own", "--set", "tracking.enabled=false"])
    assert done.exit_code == EXIT_USER and "Traceback" not in done.stderr
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"`hf download {missing}`" in said and "Hub cannot be reached" in said


def test_with_prepared_data_the_missing_model_is_named(machine: Path, tmp_path: Path) -> None:
    as_cached(machine, "openai/clip-vit-base-patch32", tiny_clip.save_clip(tmp_path / "clip"))
    done = CliRunner().invoke(app, ["run", "smolvlm_256m_own", "--set", "tracking.enabled=false"])
    assert done.exit_code == EXIT_USER and "Traceback" not in done.stderr
    assert "`hf download HuggingFaceTB/SmolVLM-256M-Instruct`" in done.stderr
    assert not (tmp_path / "runs" / "smolvlm_256m_own-modalprompt-s0" / "stages").exists()
