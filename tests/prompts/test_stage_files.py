"""What a stage's file keeps of its router: tensors of any number and shape, as the pool and its file have them too."""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.prompts.pool import PromptPool
from pipeline.prompts.stage_files import add_stage, load_stage, save_stage, stage_tensors, start_stage_folder


def test_states_that_are_views_of_one_tensor_go_through_stage_files_and_a_pools_file(tmp_path: Path) -> None:
    states, pool = [], PromptPool()
    for stage, centres in enumerate((2, 3)):  # tasks differ in the number of their centres
        both = torch.randn(centres + 1, 4, requires_grad=True)
        states.append({"centres": both, "mean.of.all": both[0], "spread": both.T, "count": torch.tensor(centres)})
        name = f"T{stage}"
        start_stage_folder(tmp_path, stage, name)
        save_stage(tmp_path, stage, name, stage_tensors({"prompt": torch.ones(2, 3) * stage}, states[-1]), {})
        found = load_stage(tmp_path, stage, name)
        assert found is not None
        add_stage(pool, name, found.tensors)
    pool.save(tmp_path / "pool.safetensors")
    read = PromptPool.load(tmp_path / "pool.safetensors")
    assert read.states_fingerprint() == pool.states_fingerprint()
    for kept in (pool, read):
        assert list(kept.tensors) == ["prompt"]
        for state, expected in zip(kept.states, states, strict=True):
            assert state.keys() == expected.keys()
            assert all(torch.equal(state[key], value.float()) for key, value in expected.items())
