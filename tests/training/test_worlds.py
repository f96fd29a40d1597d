"""The same global batch gives the same training on any number of ranks and with any ZeRO stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.processes import torchrun

TOLERANCE = 1e-5
LIMIT_S = 240


def launch(folder: Path, model: Path, processes: int, runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Train the same stage once per entry of `runs` (recipe changes) in one launch of so many ranks."""
    folder.mkdir()
    job = {"model": str(model), "out": str(folder), "runs": runs, "text_only": [2]}
    (folder / "job.json").write_text(json.dumps(job))
    torchrun(["-m", "tests.training.worlds", str(folder / "job.json")], processes, LIMIT_S)
    return json.loads((folder / "result.json").read_text())


@pytest.mark.gloo
def test_ranks_micro_batches_and_zero_stages_do_not_change_the_training(llava: Path, tmp_path: Path) -> None:
    resident = tmp_path / "zero3_resident.json"  # small parameters stay whole, large ones are gathered
    resident.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100_000}}))
    stages: dict[str, dict[str, Any]] = {
        "none": {"train__deepspeed": "ds_configs/zero0.json"},
        "zero2": {"train__deepspeed": "ds_configs/zero2.json"},
        "zero3": {"train__deepspeed": "ds_configs/zero3.json"},
        "zero3, resident": {"train__deepspeed": str(resident)},
    }
    cut = {f"{name}, cut": {**changes, "train__micro_batch": 1} for name, changes in stages.items()}
    low = {f"{name}, bf16": {**changes, "model__dtype": "bfloat16"} for name, changes in stages.items()}
    one = launch(tmp_path / "one", llava, 1, {**stages, **low})
    two = launch(tmp_path / "two", llava, 2, {**stages, **cut})
    expected = one["none"]["first"]
    for world, results in (("one rank", one), ("two ranks", two)):
        for name, result in results.items():
            assert result["first"] == result["again"], f"{world}, {name}: a stage depends on the one before it"
            for kind in ("losses", "prompt", "head"):
                found, wanted = flat(result["first"][kind]), flat(expected[kind])
                tolerance = 0.05 if "bf16" in name else TOLERANCE if kind == "losses" else 1e-4
                assert len(found) == len(wanted)
                worst = max(abs(a - b) for a, b in zip(found, wanted, strict=True))
                assert worst < tolerance, f"{world}, {name}: {kind} differ by {worst}"
    assert two["zero3"]["first"]["losses"][0][1] != two["zero3"]["first"]["losses"][-1][1]


def flat(values: Any) -> list[float]:
    return [x for value in values for x in flat(value)] if isinstance(values, list) else [values]
