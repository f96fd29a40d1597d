"""Every method trains and evaluates through its engine with a backbone in bfloat16."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from data_prep.benchmark import prepare_benchmark
from pipeline.clip.benchmark.run import run_benchmark
from pipeline.config import registry
from tests.clip.project import make_project, recipe

METHODS_HERE: list[Any] = [
    "zero_shot",
    {"name": "coop", "options": {"length": 2}},
    {"name": "cached", "method": "coop", "options": {"length": 2}, "train": {"augment": "none"}},
    {"name": "cocoop", "options": {"length": 2, "words": None}},
    {"name": "kgcoop", "options": {"length": 2}},
    {"name": "vpt", "options": {"length": 2, "depth": 2}},
    {"name": "ivlp", "options": {"length": 2, "length_vision": 2, "depth": 2}},
    {"name": "maple", "options": {"length": 2, "depth": 3}},
    {"name": "mpl", "options": {"length": 1, "depth": 3}},
    {"name": "dpl", "options": {"text": 1, "vision": 1}},
    {
        "name": "promptsrc",
        "method": "ivlp",
        "options": {"length": 2, "length_vision": 2, "depth": 2},
        "consistency": {"templates": ["a {}."]},
        "average": {"mean": 2, "deviation": 1},
    },
]


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_every_method_learns_and_is_scored(tmp_path: Path, stage: int) -> None:
    folder = make_project(tmp_path)
    model, train = {"path": str(folder / "model"), "dtype": "bfloat16"}, {"deepspeed": f"ds_configs/zero{stage}.json"}
    benchmark = recipe(folder, *METHODS_HERE, seeds=[1], model=model, train=train)
    assert {method.kind for method in benchmark.methods} == set(registry.names("clip_methods"))
    prepare_benchmark(benchmark, progress=False)
    result = run_benchmark(benchmark)
    assert [line["method"] for line in result["lines"]] == [method.name for method in benchmark.methods]
    for method in benchmark.methods[1:]:
        unit = benchmark.run_path / "units" / f"{method.name}-toys-s1"
        losses = [json.loads(line)["loss"] for line in (unit / "metrics.jsonl").read_text().splitlines()]
        assert losses and all(map(math.isfinite, losses)), method.name
        values = load_file(unit / "prompts.safetensors")
        assert all(bool(value.isfinite().all()) for value in values.values()), method.name
