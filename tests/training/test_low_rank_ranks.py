"""Low-rank updates under ZeRO-2 and ZeRO-3 on two ranks, with layers computed again, learn what one rank learns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training.test_sequence_ranks import TASKS, on_ranks

METHOD = {
    "name": "task_lora",
    "rank": 2,
    "alpha": 4.0,
    "targets": [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
        "embed_tokens",
        "image_projector",
    ],
}


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("zero", "checkpointing"),
    [
        (3, "full"),
        pytest.param(2, "full", marks=pytest.mark.slow),
        pytest.param(3, "selective", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_that_recompute_learn_the_updates_of_one_rank(
    prepared: Path, tmp_path: Path, zero: int, checkpointing: str
) -> None:
    changes = {"method": METHOD, "train__lr_prompt": 1e-2}
    one = on_ranks(prepared, tmp_path, 1, 0, **changes)
    two = on_ranks(prepared, tmp_path, 2, zero, train__checkpointing=checkpointing, **changes)
    assert [json.loads((run / "run.json").read_text())["world_size"] for run in (one, two)] == [1, 2]
    for number in range(TASKS):
        file = Path("stages") / f"{number + 1:02d}-T{number}" / "prompts.safetensors"
        expected, found = load_file(one / file), load_file(two / file)
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-3, msg=name)
