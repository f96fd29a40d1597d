"""Operations of a block are counted as torch's counter counts them, and a count changes nothing and fails nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from pipeline.training.operations import FORMULAS, OperationCount, counting


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 8), nn.GELU(), nn.Linear(8, 2))


def step(module: nn.Module) -> list[torch.Tensor]:
    module.zero_grad()
    module(torch.ones(2, 3, 8, 8)).square().sum().backward()
    return [value.grad for value in module.parameters() if value.grad is not None]


def test_forward_and_backward_are_counted_as_by_torch_and_change_by_no_bit() -> None:
    module = network()
    plain = [value.clone() for value in step(module)]
    with FlopCounterMode(display=False) as theirs:
        step(module)
    ours = OperationCount()
    with counting(ours):
        counted = step(module)
    assert ours.operations == theirs.get_total_flops() > 0
    assert ours.whole
    assert all(torch.equal(one, other) for one, other in zip(plain, counted, strict=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_operations_made_of_others_are_counted_without_gradients_too(mode: Any) -> None:
    module, ours, conv = nn.Linear(5, 7), OperationCount(), nn.Conv2d(3, 4, 3)
    with mode(), counting(ours):
        module(torch.ones(2, 3, 5))
    assert ours.operations == 2 * 2 * 3 * 5 * 7
    with mode(), counting(OperationCount()) as convolved:
        conv(torch.ones(2, 3, 8, 8))
    assert convolved.operations == 2 * 2 * 4 * 36 * 27
    one = torch.randn(2, 4, 6, 8)
    with mode(), counting(OperationCount()) as attended:
        scaled_dot_product_attention(one, one, one)
    assert attended.operations == 2 * 4 * (2 * 6 * 6 * 8) * 2


def test_attention_on_the_cpu_is_counted() -> None:
    one, ours = torch.randn(2, 4, 6, 8), OperationCount()
    with torch.no_grad(), counting(ours):
        scaled_dot_product_attention(one, one, one)
    assert ours.operations == 2 * 4 * (2 * 6 * 6 * 8) * 2


def test_a_formula_that_fails_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> int:
        raise AssertionError("shapes")

    monkeypatch.setitem(FORMULAS, torch.ops.aten.mm, fails)
    ours = OperationCount()
    with counting(ours):
        assert torch.equal(torch.eye(2) @ torch.eye(2), torch.eye(2))
    assert (ours.operations, ours.whole, ours.per_sample) == (0, False, None)
