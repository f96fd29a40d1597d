"""A whole sequence on two ranks under ZeRO-3 learns what it learns on one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.e2e.conftest import recipe_on
from tests.processes import torchrun

TASKS, TOLERANCE, LIMIT_S = 2, 1e-5, 300


def on_ranks(root: Path, folder: Path, ranks: int, zero: int, **changes: Any) -> Path:
    """Train the sequence through the command line under torchrun and return the run's folder."""
    run = folder / f"{ranks}-ranks"
    recipe = recipe_on(root, run, TASKS, train__deepspeed=f"ds_configs/zero{zero}.json", **changes)
    recipe.dump_yaml(folder / f"{ranks}.yaml")
    torchrun(["-m", "pipeline", "train", str(folder / f"{ranks}.yaml")], ranks, LIMIT_S)
    return recipe.run_path


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("projector", "zero_of_one"), [("frozen", 3), pytest.param("trained", 0, marks=pytest.mark.slow)]
)
def test_two_ranks_under_zero3_learn_the_prompt_sets_and_projector_of_one_rank(
    prepared: Path, projector: str, zero_of_one: int, tmp_path: Path
) -> None:
    changes = {"train__projector": projector, "train__lr_projector": 1e-3, "train__lr_prompt": 1e-2}
    runs = [on_ranks(prepared, tmp_path, ranks, zero, **changes) for ranks, zero in ((1, zero_of_one), (2, 3))]
    assert [json.loads((run / "run.json").read_text())["world_size"] for run in runs] == [1, 2]
    for number in range(TASKS):
        one, two = (load_file(run / "stages" / f"{number + 1:02d}-T{number}" / "prompts.safetensors") for run in runs)
        assert one.keys() == two.keys()
        assert any(name.startswith("projector.") for name in one) is (projector == "trained")
        for name, value in one.items():
            worst = (two[name] - value).abs().max()
            assert worst <= TOLERANCE, f"stage {number + 1}: {name} differs by {worst}"
