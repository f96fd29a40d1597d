"""The load test with a real vLLM: the own engine and both forms of prompt sets, side by side in one run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.bench.__main__ import app
from tests.vllm.models import TASKS, save_loadable
from tests.vllm.test_end_to_end import ENGINE, PROGRAM, SMALL, save_tasks

pytestmark = [pytest.mark.vllm, pytest.mark.e2e]

REQUESTS, CLIENTS = 300, 8


def test_all_engines_answer_as_one_by_one(tmp_path: Path) -> None:
    if not PROGRAM.is_file():
        pytest.skip(f"{PROGRAM} is missing; `make test-vllm` installs it")
    adapter = save_tasks(tmp_path / "adapter", save_loadable(tmp_path), len(TASKS))
    options = ["serve", str(adapter), "--engines", "own,vocabulary,parts", "--vllm", str(PROGRAM), "--json"]
    options += ["--engine-args", SMALL, "--clients", str(CLIENTS), "--requests", str(REQUESTS)]
    done = CliRunner().invoke(app, options, env=ENGINE)
    assert done.exit_code == 0, done.output
    line = done.stdout.splitlines()[-1]
    print(line)
    found = json.loads(line)
    same = found["same_answers"]
    assert same["own"] == 1.0
    # The load test's photographs are scaled down, which the processor of vLLM's environment does by torchvision.
    assert min(same["vocabulary"], same["parts"]) > 0.8
    assert all(numbers["requests_per_s"] > 0 for numbers in found["variants"].values())
