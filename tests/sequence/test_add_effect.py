"""What a new task does to earlier ones follows from similarities, and the advised gate does what its sentence says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.methods.modalprompt import ModalPromptOptions
from pipeline.sequence.add_effect import Effect, Interference, Similarities, advice, basis, keeping_gate

RUN = Path("runs/mine")


def similar(rows: list[list[float]] | Tensor, number: int = 0) -> Similarities:
    scores = torch.as_tensor(rows, dtype=torch.float32)
    return Similarities(f"t{number}", number, scores, torch.ones(len(scores), dtype=torch.bool))


def method(gate: float | None = 0.1, k: int = 3) -> ModalPromptOptions:
    return ModalPromptOptions(gate=gate, k=k)


def percent(found: Similarities, gate: float | None, k: int = 3) -> float:
    chosen = found.inserted(method(gate, k))
    return 100.0 * float(chosen.double().mean())


def test_who_gets_the_set_follows_from_the_similarities() -> None:
    found = similar([[0.7, 0.2, 0.62], [0.7, 0.1, 0.64], [0.5, 0.1, 0.6], [0.7, 0.3, 0.1]])
    assert found.inserted(method()).tolist() == [True, True, True, False]
    assert found.behind().tolist() == pytest.approx([0.08, 0.06, -0.1, 0.6])


def test_the_advised_gate_is_the_largest_that_keeps_the_set_out_of_99_of_100_of_every_task() -> None:
    generator = torch.Generator().manual_seed(0)
    tasks = []
    for number, count in enumerate((500, 200, 150)):
        scores = torch.rand(count, 4, generator=generator) * 0.1
        scores[:, number] += 0.15
        scores[:, 3] += torch.rand(count, generator=generator) * 0.1
        scores[:, 3] = scores[:, 3].minimum(scores[:, :3].amax(1) - 0.004)
        tasks.append(similar(scores, number))
    gate = keeping_gate(method(gate=0.3), tasks)
    assert gate is not None and 0 < gate < 0.3
    assert all(percent(task, gate) <= 1 for task in tasks)
    assert any(percent(task, gate + 0.0015) > 1 for task in tasks)


def test_always_k_sets_is_a_gate_that_can_be_too_large() -> None:
    found = similar([[0.7, 0.6]] * 100)
    assert keeping_gate(method(gate=None), [found]) == pytest.approx(0.099)


@pytest.mark.parametrize(("rows", "k"), [([[0.7, 0.2, 0.1]] * 100, 3), ([[0.7, 0.65, 0.64]] * 100, 2)])
def test_a_gate_that_keeps_the_set_out_already_is_left_alone(rows: list[list[float]], k: int) -> None:
    assert keeping_gate(method(gate=0.1, k=k), [similar(rows)]) is None


def test_one_in_a_hundred_may_remain() -> None:
    found = similar([[0.7, 0.69]] + [[0.7, 0.65]] * 99)
    gate = keeping_gate(method(), [found])
    assert gate == pytest.approx(0.049) and percent(found, gate) == 1.0


# ------------------------------------------------------------------ in sentences


def effect(
    inserted: float, first: float = 0.0, held_out: bool = True, scores: tuple[float, float] | None = None
) -> Effect:
    before, after = scores or (None, None)
    return Effect("Old", samples=50, held_out=held_out, inserted=inserted, first=first, before=before, after=after)


def sentences(*effects: Effect, gate: float | None = None) -> str:
    return " ".join(advice(Interference(list(effects), gate, {"Old": 0.4}), RUN, "New"))


def test_a_task_that_is_left_alone_needs_no_word() -> None:
    assert sentences(effect(inserted=2.0), gate=0.05) == ""


def test_where_the_set_comes_beside_the_own_one_the_gate_is_named_with_what_it_leaves() -> None:
    said = sentences(effect(inserted=60.0), gate=0.043)
    assert "add runs/mine New --gate 0.043" in said and "at most 1 in 100" in said and "Old 0.4" in said
    assert "prune" not in said and "prune adapter New" in sentences(effect(60.0, scores=(80.0, 70.0)), gate=0.04)


def test_where_the_set_is_nearer_than_the_own_one_no_gate_is_promised() -> None:
    said = sentences(effect(inserted=70.0, first=70.0), gate=0.04)
    assert "questions differently" in said and "--gate" not in said


def test_no_gate_is_named_by_a_score_on_a_test_set() -> None:
    assert sentences(effect(inserted=2.0, scores=(80.0, 10.0)), gate=0.04) == ""


def test_what_the_shares_are_of_is_said() -> None:
    assert "held-out samples" in basis([effect(1.0)], "New") and "test" not in basis([effect(1.0)], "New")
    assert "training samples (this run holds none out" in basis([effect(1.0, held_out=False)], "New")
    assert "scores are those on the test sets" in basis([effect(1.0, scores=(1.0, 1.0))], "New")
