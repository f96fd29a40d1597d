"""Each tutorial is walked through: its commands in their order, on tiny models in the Hub's cache and a few samples.

The recipes are the shipped ones with fewer and smaller steps. Models have the real ones' names, configuration and
image settings (`tests/backbones/shrunk_models.py`), so the commands are executed as they are shown.
"""

from __future__ import annotations

import csv
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from data_prep.nano.example import write_example
from data_prep.sources import colour_shapes
from pipeline.cli.commands import app
from pipeline.config import yaml_file as recipe_file
from pipeline.config.load import load_recipe
from pipeline.config.paths import PROJECT
from pipeline.errors import EXIT_OK, EXIT_RESUMABLE
from tests import tiny_clip
from tests.backbones.shrunk_models import as_cached, save_shrunk
from tests.docs.test_commands import TUTORIALS, commands
from tests.docs.test_other_commands import BLOCK
from tests.e2e.test_coin import write_coin
from tests.serve.conftest import address_of, start

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

STEPS = {
    "steps": 1,
    "global_batch": 2,
    "micro_batch": 1,
    "workers": 0,
    "processes": 1,
    "deepspeed": "ds_configs/zero0.json",
}
SMALL = {"model": {"dtype": "float32"}, "train": STEPS, "tracking": {"enabled": False}}
CLIP_STEPS = {"train": {"epochs": 1, "deepspeed": "ds_configs/zero0.json"}, "tracking": {"enabled": False}}
EMBEDDED_CLIP = "data_prep/nano/checkpoints/clip"
CLASSES = ("red_circle", "blue_square", "green_triangle")
PARTS_OF_A_CLUSTER = {"train": {**STEPS, "global_batch": 16}}  # `check --ranks 16`
WAITS_FOR_A_PERSON = "run label_folder --label --set data.root=photos"  # tests/browser/test_own_images.py
MODELS = ("smolvlm_256m_own", "qwen25vl_3b_own", "coin_llava15_7b")


def shown(page: str) -> list[str]:
    """The lines of the page's blocks of commands, without remarks."""
    blocks = BLOCK.findall((PROJECT / "docs" / page).read_text("utf-8"))
    return [line.partition("  #")[0].strip() for kind, block in blocks if not kind for line in block.splitlines()]


def verbs(page: str) -> list[str]:
    """Those of `python -m pipeline`."""
    return [line.removeprefix("python -m pipeline ") for line in shown(page) if line.startswith("python -m pipeline ")]


@pytest.fixture
def folder(empty_machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder on a machine without a network, with small recipes of the shipped names."""
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    for names, small in (
        (("smolvlm_256m_own", "qwen25vl_3b_own", "llava15_7b_coin3"), SMALL),
        (("coin_llava15_7b",), {**SMALL, **PARTS_OF_A_CLUSTER}),
        (("label_folder",), {**CLIP_STEPS, "model": {"path": EMBEDDED_CLIP}}),
        (("base2new_nano",), CLIP_STEPS),
    ):
        for name in names:
            content = {"extends": str(recipe_file.RECIPES / f"{name}.yaml"), "name": name, **small}
            (recipes / f"{name}.yaml").write_text(yaml.safe_dump(content))
    for name in MODELS:
        recipe = load_recipe(name)
        _cached(empty_machine, recipe.model.path, partial(save_shrunk, repository=recipe.model.path))
        _cached(empty_machine, recipe.keys.path, tiny_clip.save_clip)
    monkeypatch.setattr(recipe_file, "RECIPES", recipes)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name, value in {"HF_HUB_CACHE": empty_machine, "HF_HUB_OFFLINE": "1", "PYTHONPATH": PROJECT}.items():
        monkeypatch.setenv(name, str(value))  # for processes that are started
    return tmp_path


def _cached(cache: Path, name: str, save: Callable[[Path], Any]) -> None:
    made = cache.parent / "made" / name
    if not made.exists():
        save(made)
        as_cached(cache, name, made)


def walked(command: str, expected: int = EXIT_OK) -> str:
    """Execute a verb as it is shown; returns its output."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # a run leaves them; a user's next command has them not
            patch.delenv(name, raising=False)
        done = CliRunner().invoke(app, shlex.split(command))
    assert done.exit_code == expected, f"{command}: {done.output}"
    return done.output


def python_of(page: str) -> None:
    """Run the page's Python, each block in a process of its own."""
    for block in re.findall(r"```python\n(.*?)```", (PROJECT / "docs" / page).read_text("utf-8"), re.DOTALL):
        done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and done.stdout.strip(), done.stderr[-3000:]


def test_each_tutorial_is_walked_through_here() -> None:
    here = Path(__file__).read_text("utf-8")
    assert len(TUTORIALS) >= 5
    assert not [page.name for page in TUTORIALS if f'"{page.name}"' not in here]
    for page in TUTORIALS:  # a command in a sentence is none of the path
        assert set(verbs(page.name)) >= {command for command in commands(page) if "--set name=" in command}
        assert len(verbs(page.name)) >= 3, page.name


def test_own_photographs_to_a_served_adapter(folder: Path) -> None:
    write_example(folder, 12, seed=0)  # the page's line without pictures of one's own
    page = "tutorial_own_model.md"
    for command in verbs(page):
        if command.startswith("serve"):
            process = start(Path(shlex.split(command)[1]))
            assert address_of(process).startswith("http://127.0.0.1:")
            process.terminate()
            process.wait(60)
            continue
        said = walked(command)
        if "--dry-run" in command:
            assert "Expected interference" in said
        elif command.startswith("predict"):
            assert "answer:" in said and "sets:" in said
    assert (folder / "my-adapter" / "adapter.json").is_file()
    python_of(page)


def test_coin_to_a_matrix_and_a_further_task_on_a_cluster(folder: Path) -> None:
    write_coin(folder / "data" / "CoIN")
    first, *commands = verbs("tutorial_coin.md")
    assert first.startswith("check")
    walked(first, expected=2)  # nothing is prepared
    for command in commands:
        walked(command)
    assert (folder / "runs" / "coin_llava15_7b-modalprompt-s0" / "matrix.json").is_file()
    write_example(folder, 12, seed=0)
    for command in verbs("tutorial_cluster.md"):  # the run is that of the tutorial before
        said = walked(command)
    assert "Expected interference" in said
    prepare, wrapped = re.findall(r'--wrap "python -m pipeline (.*)"', "\n".join(shown("tutorial_cluster.md")))
    walked(prepare.removesuffix(" --gpus 8"))  # there are none here
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}.items():
            patch.setenv(name, value)  # the shell of a job with one task starts the ranks itself
        assert "Effect on earlier tasks" in walked(wrapped)


def _drawn(folder: Path) -> Path:
    return colour_shapes.draw(folder / "drawn", seed=5) / "images"


def test_folders_of_classes_to_a_benchmark(folder: Path) -> None:
    drawn, page = _drawn(folder), "tutorial_clip.md"
    for name in CLASSES:
        for split in ("train", "test"):
            (folder / "data" / "mine" / "pets" / split / name).mkdir(parents=True)
            for number in range(4):
                file = f"{split}-{number:03d}.png"
                shutil.copy(drawn / name / file, folder / "data" / "mine" / "pets" / split / name / file)
    shutil.copy(drawn / CLASSES[0] / "train-004.png", folder / "photo.jpg")
    (recipe,) = re.findall(r"```yaml\n(.*?)```", (PROJECT / "docs" / page).read_text("utf-8"), re.DOTALL)
    for old, new in {
        "openai/clip-vit-base-patch16": EMBEDDED_CLIP,
        "seeds: [1, 2, 3]": "seeds: [1]\ntracking: {enabled: false}",
        "depth: 9": "depth: 2",
        "epochs: 50": "epochs: 2",
        "epochs: 5,": "epochs: 1, deepspeed: ds_configs/zero0.json,",
    }.items():
        assert old in recipe
        recipe = recipe.replace(old, new)
    (folder / "pets.yaml").write_text(recipe, "utf-8")
    commands = verbs(page)
    assert [command.split()[0] for command in commands] == ["check", "run", "report", "predict"]
    for command in commands:
        said = walked(command)
    assert any(name in said for name in CLASSES)


def _label(run: Path, truth: dict[str, str]) -> None:
    """Fill in what is asked, as a person does in a spreadsheet."""
    with (run / "ask.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["label"] = truth[next(Path(cell).name for cell in row.values() if cell and Path(cell).name in truth)]
    with (run / "ask.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)


def test_a_folder_without_labels_to_a_classifier(folder: Path) -> None:
    drawn, photos, truth = _drawn(folder), folder / "photos", dict[str, str]()
    photos.mkdir()
    for number in range(36):
        name = CLASSES[number % len(CLASSES)]
        truth[f"IMG_{number:04d}.png"] = name
        shutil.copy(drawn / name / f"train-{number // len(CLASSES):03d}.png", photos / f"IMG_{number:04d}.png")
    (photos / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    shutil.copy(drawn / CLASSES[0] / "train-015.png", folder / "photo.jpg")
    first, page, again, last = verbs("tutorial_labelling.md")
    assert page == WAITS_FOR_A_PERSON and first == again
    run = folder / "runs" / "label_folder"
    for _ in range(3):
        assert "ask.csv" in walked(again, expected=EXIT_RESUMABLE)
        _label(run, truth)
    walked(again)
    assert any(name in walked(last) for name in CLASSES)


def test_a_command_that_does_not_work_would_be_noticed(folder: Path) -> None:
    with pytest.raises(AssertionError, match="nothing_such"):
        walked("check nothing_such")
    assert os.getcwd() == str(folder)
