"""The example packages of docs/extending.md, each installed outside of the repository, run from end to end."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.adapter.answering import Question
from pipeline.adapter.from_run import export
from pipeline.adapter.load import load_adapter
from pipeline.clip.methods import learner_of_sizes
from pipeline.config import registry
from pipeline.config.load import load_recipe
from pipeline.config.paths import PROJECT
from pipeline.errors import EXIT_OK
from pipeline.metrics.scoring import Answered, score_task
from pipeline.sequence.run import run_sequence
from tests.clip import project
from tests.extending.conftest import TASKS
from tests.extending.site_folder import PACKAGES
from tests.joining import require_same_answers_in_any_batch

pytestmark = pytest.mark.e2e
FAST = {"epochs": 1, "warmup_epochs": 0, "augment": "none", "processes": 1}


def command(folder: Path, site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process that finds the packages as installed ones."""
    path = os.pathsep.join([str(PROJECT), str(site)])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == EXIT_OK, done.stdout[-2000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def run(folder: Path, site: Path) -> Path:
    """A run of the recipe, from the command line: rule, data format, both metrics and the model family."""
    command(folder, site, "run", "mine.yaml", "--set", "data.prepare_first=true")
    return folder / "runs" / "modalprompt"


def rows(run: Path, task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "eval" / "after-02" / f"{task}.jsonl").read_text().splitlines()]


def test_the_data_format_gives_every_sample(run: Path) -> None:
    for task in TASKS:
        assert [row["id"] for row in rows(run, task)] == ["0", "1", "2", "3"]


def test_the_rule_inserts_the_two_nearest_sets_by_their_similarity(run: Path) -> None:
    for row in rows(run, "Colours"):
        similarity = dict(zip(TASKS, row["similarity"], strict=True))
        assert row["selected"] == sorted(TASKS, key=similarity.__getitem__)
        second, first = (similarity[name] for name in row["selected"])
        assert row["weights"] == pytest.approx([max(second, 0.0) / first, 1.0], abs=1e-3)


def test_the_metrics_score_the_answers(run: Path, installed: Path) -> None:
    matrix = json.loads((run / "matrix.json").read_text())
    for task, metric in zip(TASKS, ("first_word", "balanced"), strict=True):
        found = [Answered(row["prediction"], row["answer"]) for row in rows(run, task)]
        assert matrix["accuracy"][1][TASKS.index(task)] == score_task(metric, found).percent


def test_an_adapter_answers_with_the_model_family_and_the_rule(
    run: Path, folder: Path, installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    export(run, folder / "adapter")
    answer = load_adapter(folder / "adapter").ask("what is 1?", folder / "tables/Colours/images/test-0.png")
    assert len(answer.selected) == 2
    assert answer.weights is not None and max(answer.weights.values()) == 1.0


def test_a_method_and_a_router(run: Path, folder: Path, installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    recipe = load_recipe("mine.yaml", ["method={name: lone_prompts, prompt_length: 4, router: best_key}"])
    run_sequence(recipe)
    found = rows(recipe.run_path, "Colours")
    assert all(len(row["similarity"]) == 2 for row in found)
    weights = [row["weights"] for row in found]
    assert [sum(each) for each in weights] == pytest.approx([1.0] * 4, abs=1e-3)


def test_a_lora_method_with_a_part_of_its_own(
    run: Path, folder: Path, installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert len((PACKAGES / "lora_fa" / "lora_fa.py").read_text("utf-8").splitlines()) <= 120
    method = "method={name: lora_fa, rank: 2, targets: [q_proj, v_proj], dropout: 0.1}"
    recipe = load_recipe("mine.yaml", [method, "train.lr_prompt=0.3"])
    run_sequence(recipe)
    files = sorted((recipe.run_path / "stages").glob("*/prompts.safetensors"))
    first, second = (load_file(path) for path in files)
    common = [name for name in first if name.startswith("shared.lora_fa.")]
    own = [name for name in first if name.startswith("lora_fa.")]
    assert len(common) == len(own) == 4 and all(torch.equal(first[name], second[name]) for name in common)
    assert all(first[name].abs().sum() > 0 and not torch.equal(first[name], second[name]) for name in own)
    export(recipe.run_path, folder / "lora_fa")
    answerer = load_adapter(folder / "lora_fa")
    pictures = [(folder / f"tables/{task}/images/test-0.png").read_bytes() for task in TASKS]
    asked = [Question(f"what is {n}?", picture) for picture in pictures for n in range(3)]
    require_same_answers_in_any_batch(answerer, asked, 4)
    assert {name for answer in answerer.answer(asked) for name in answer.selected} == set(TASKS)


def test_a_clip_method(tmp_path: Path, site: Path) -> None:
    project.make_project(tmp_path)
    project.recipe_file(tmp_path, {"name": "one_word", "options": {"length": 2}}, seeds=[1], train=FAST)
    command(tmp_path, site, "run", "tiny.yaml")
    units = sorted(path.name for path in (tmp_path / "runs/tiny/units").iterdir())
    assert units == ["one_word-toys-s1"]


def test_a_clip_method_has_one_vector(installed: Path) -> None:
    from pipeline.clip.towers.backbone import Sizes
    from tests.clip.tiny import clip_model

    learner = learner_of_sizes("one_word", Sizes.of(clip_model().config), length=3)
    assert [tuple(value.shape) for value in learner.parameters()] == [(1, 32)]
    assert torch.equal(learner.prompts().text[0], learner.get_parameter("ctx").expand(3, -1))


@pytest.mark.parametrize("folder_of", sorted(path.name for path in PACKAGES.iterdir()))
def test_the_page_shows_the_package_as_it_is(folder_of: str) -> None:
    page = (PROJECT / "docs" / "extending.md").read_text("utf-8")
    assert f"```python\n{(PACKAGES / folder_of / f'{folder_of}.py').read_text('utf-8')}```" in page


def shown_tests() -> dict[str, str]:
    """The tests that the page shows, by the name of the first one."""
    page = (PROJECT / "docs" / "extending.md").read_text("utf-8")
    blocks = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "def test_" in block]
    return {re.findall(r"def (test_\w+)", block)[0]: block for block in blocks}


@pytest.mark.parametrize("name", shown_tests())
def test_the_tests_that_the_page_shows_pass(name: str, installed: Path, tmp_path: Path) -> None:
    names: dict[str, Any] = {}
    exec(compile(shown_tests()[name], "docs/extending.md", "exec"), names)
    called = [value for key, value in names.items() if key.startswith("test_")]
    for function in called:
        function(**({"tmp_path": tmp_path} if "tmp_path" in function.__annotations__ else {}))
    assert called


def test_every_kind_has_an_example_that_the_registry_finds(installed: Path) -> None:
    for kind, built_in in registry.BUILT_IN.items():
        if kind == "terms":  # the page points to the project's own file
            continue
        added = set(registry.names(kind)) - set(built_in)
        assert added, kind
        for name in added:
            registry.load(kind, name)
