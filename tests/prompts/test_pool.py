"""The pool keeps finished sets as they were."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.errors import UserError
from pipeline.prompts.pool import PromptPool


def filled() -> PromptPool:
    pool = PromptPool()
    for name in "ab":
        pool.append(name, {"prompt": torch.randn(2, 4)}, {"prototype": torch.randn(3)})
    return pool


def test_appending_leaves_the_earlier_sets_bit_identical() -> None:
    pool = filled()
    prompts, prototypes, prints = pool.prompts.clone(), pool.prototypes.clone(), pool.fingerprint(1)
    pool.append("c", {"prompt": torch.randn(2, 4)}, {"prototype": torch.randn(3)})
    assert torch.equal(pool.prompts[:2], prompts)
    assert torch.equal(pool.prototypes[:2], prototypes)
    assert pool.fingerprint(1) == prints
    assert pool.fingerprint(2) != prints


def test_a_pool_does_not_change_with_the_tensor_it_was_given() -> None:
    pool, prompt = PromptPool(), torch.zeros(2, 4)
    pool.append("a", {"prompt": prompt}, {"prototype": torch.zeros(3)})
    prompt += 1
    assert not pool.prompts.any()


def test_a_saved_pool_is_read_back(tmp_path: Path) -> None:
    pool = filled()
    pool.save(tmp_path / "pool.safetensors")
    found = PromptPool.load(tmp_path / "pool.safetensors")
    assert found.names == ["a", "b"]
    assert torch.equal(found.prompts, pool.prompts)
    assert torch.equal(found.prototypes, pool.prototypes)


def test_a_set_of_another_shape_is_refused() -> None:
    with pytest.raises(UserError, match=r"'c' has prompt of shape \(5, 4\), the pool holds \(2, 4\)"):
        filled().append("c", {"prompt": torch.randn(5, 4)}, {"prototype": torch.randn(3)})


def test_a_missing_pool_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.safetensors"):
        PromptPool.load(tmp_path / "nothing.safetensors")
