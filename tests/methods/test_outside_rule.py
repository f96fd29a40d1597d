"""A selection rule that lies in a file outside the repository is named in a recipe, and trains, answers and resumes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import registry
from pipeline.config.method import method_options
from pipeline.errors import UserError
from pipeline.methods import make_method
from tests.e2e.conftest import prepare_project, recipe_on
from tests.processes import PROJECT

RULE = '''
"""The two most similar prompt sets, each with its share of the similarity."""

import torch

from pipeline.config.base import Section
from pipeline.data.selection import Selection
from pipeline.prompts.rules import Rule
from pipeline.prompts.rules.top_k import select_for_inference


class Options(Section):
    sharpness: float = 1.0


class NearestTwo(Rule):
    Options = Options
    compares = True

    def training(self, scores, own):
        return self.weighted(scores, 1)

    def inference(self, scores, tasks):
        return self.weighted(scores, 2)

    def weighted(self, scores, most):
        numbers = select_for_inference(scores, most)
        shares = torch.softmax(scores.gather(1, numbers).float() * self.options.sharpness, dim=1)
        return Selection(numbers, shares)

    def most(self, modules):
        return min(2, modules)
'''


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder on the path with the file and what an installed package says of it."""
    folder = tmp_path / "site"
    (folder / "nearest_two-1.0.dist-info").mkdir(parents=True)
    (folder / "nearest_two.py").write_text(RULE)
    (folder / "nearest_two-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: nearest-two\n")
    points = "[continual_prompts.rules]\nnearest_two = nearest_two:NearestTwo\n"
    (folder / "nearest_two-1.0.dist-info" / "entry_points.txt").write_text(points)
    return folder


@pytest.fixture
def on_path(installed: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(installed))
    return installed


def test_a_rule_is_named_by_its_target(on_path: Path) -> None:
    options = method_options(selection={"name": "nearest_two:NearestTwo", "sharpness": 2.0})
    rule = make_method(options).routing.rule
    assert (type(rule).__name__, rule.options.sharpness, rule.most(7)) == ("NearestTwo", 2.0, 2)


def test_a_registered_rule_is_one_of_the_names(on_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    registry.register("rules", "nearest", "nearest_two:NearestTwo")
    assert "nearest" in registry.names("rules")
    assert make_method(method_options(selection="nearest")).routing.rule.options.sharpness == 1.0
    with pytest.raises(UserError, match="There is a selection rule 'topk' already"):
        registry.register("rules", "topk", "nearest_two:NearestTwo")


def test_wrong_options_of_a_rule_are_told(on_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no option 'sharpnes'; it has sharpness\. Did you mean 'sharpness'\?"):
        _ = make_method(method_options(selection={"name": "nearest_two:NearestTwo", "sharpnes": 2.0})).routing
    with pytest.raises(UserError, match="cannot be imported"):
        _ = make_method(method_options(selection="nearest_too:NearestTwo")).routing


@pytest.mark.e2e
def test_a_run_with_a_rule_of_an_installed_package(installed: Path, tmp_path: Path) -> None:
    root = prepare_project(tmp_path / "project", tasks=3)
    recipe = recipe_on(root, tmp_path / "runs", method={"prompt_length": 2})
    fields: dict[str, Any] = recipe.model_dump(mode="json")
    fields["method"]["selection"] = "nearest_two"
    (tmp_path / "mine.yaml").write_text(json.dumps(fields))
    env = {**os.environ, "PYTHONPATH": f"{installed}{os.pathsep}{PROJECT}"}
    command = [sys.executable, "-m", "pipeline", "run", str(tmp_path / "mine.yaml")]
    done = subprocess.run(command, cwd=PROJECT, env=env, timeout=600, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    run = next((tmp_path / "runs").iterdir())
    lines = [json.loads(line) for line in (run / "eval" / "after-03" / "T1.jsonl").read_text("utf-8").splitlines()]
    for line in lines:
        assert len(line["selected"]) == 2 and sum(line["weights"]) == pytest.approx(1.0, abs=1e-6)
        assert line["weights"] == sorted(line["weights"])
    first = json.loads((run / "eval" / "after-01" / "T0.jsonl").read_text("utf-8").splitlines()[0])
    assert first["weights"] == [1.0]
    assert json.loads((run / "run.json").read_text("utf-8"))["changes_earlier"] == "nothing"
