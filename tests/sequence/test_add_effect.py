"""What a new task does to earlier ones follows from similarities, and the advised gate does what its sentence says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.methods.modalprompt import ModalPromptOptions
from pipeline.sequence.add_advice import LISTED, advice, basis, effect_table
from pipeline.sequence.add_effect import Effect, Interference, Remedy
from pipeline.sequence.add_limit import Limit, Similarities, changed, first_of, keeping_gate, keeping_share

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


def probable(rows: list[list[float]], number: int = 0) -> Similarities:
    """Samples whose tasks have these probabilities."""
    return similar(torch.tensor(rows).log(), number)


def by_share(share: float | None = None, k: int = 3) -> ModalPromptOptions:
    return ModalPromptOptions(share=share, k=k)


def test_the_advised_share_is_the_smallest_that_keeps_the_set_out_of_99_of_100_of_every_task() -> None:
    generator = torch.Generator().manual_seed(0)
    tasks = []
    for number, count in enumerate((500, 200, 150)):
        logits = torch.randn(count, 4, generator=generator)
        logits[:, number] += 4.0
        logits[:, 3] = logits[:, 3].minimum(logits[:, :3].amax(1) - 0.05)
        tasks.append(similar(logits.log_softmax(1), number))
    share = keeping_share(by_share(0.01), tasks)
    assert share is not None and 0.01 < share < 1

    def still(task: Similarities, value: float) -> float:
        return 100.0 * float(task.inserted(by_share(value)).double().mean())

    assert all(still(task, share) <= 1 for task in tasks)
    assert any(still(task, share - 0.0015) > 1 for task in tasks)


def test_a_share_is_advised_where_none_was_set_and_left_alone_where_it_suffices() -> None:
    found = probable([[0.6, 0.4]] * 100)
    share = keeping_share(by_share(None), [found])
    assert share == pytest.approx(0.667, abs=0.002) and not found.inserted(by_share(share)).any()
    assert keeping_share(by_share(0.7), [found]) is None
    assert keeping_share(by_share(0.1, k=1), [found]) is None
    assert keeping_share(by_share(0.1), []) is None and keeping_gate(method(), []) is None


def test_a_share_of_one_inserts_none_beside_the_best() -> None:
    found = probable([[0.50005, 0.49995]] * 100)
    assert keeping_share(by_share(0.5), [found]) == 1.0 and not found.inserted(by_share(1.0)).any()


def test_a_question_that_gets_no_set_gets_not_the_new_one_either() -> None:
    found = probable([[0.5, 0.5], [0.6, 0.4]])
    bare = Similarities("t", 0, found.scores, found.has_image, torch.tensor([True, False]))
    assert bare.inserted(by_share(0.1)).tolist() == [False, True]


def test_which_questions_get_other_sets_and_which_task_ranks_first() -> None:
    before = similar([[0.7, 0.2], [0.2, 0.7], [0.7, 0.65]]).selection(method())
    after = similar([[0.7, 0.2, 0.1], [0.7, 0.2, 0.1], [0.7, 0.65, 0.66]]).selection(method())
    assert changed(before, after).tolist() == [False, True, True]
    assert first_of(similar([[0.1, 0.9], [0.8, 0.2], [0.3, 0.4], [0.2, 0.3]])) == {0: 25.0, 1: 75.0}


def test_one_in_a_hundred_may_remain() -> None:
    found = similar([[0.7, 0.69]] + [[0.7, 0.65]] * 99)
    gate = keeping_gate(method(), [found])
    assert gate == pytest.approx(0.049) and percent(found, gate) == 1.0


# ------------------------------------------------------------------ in sentences


def effect(
    inserted: float, first: float = 0.0, held_out: bool = True, scores: tuple[float, float] | None = None
) -> Effect:
    before, after = scores or (None, None)
    return Effect("Old", 50, held_out, inserted, first, changed=inserted, before=before, after=after)


def sentences(*effects: Effect, gate: float | None = None) -> str:
    limit = None if gate is None else Limit("gate", gate, {"Old": 0.4})
    return " ".join(advice(Interference(list(effects), limit), RUN, "New"))


def test_a_task_that_is_left_alone_needs_no_word() -> None:
    assert sentences(effect(inserted=2.0), gate=0.05) == ""


def test_where_the_set_comes_beside_the_own_one_the_gate_is_named_with_what_it_leaves() -> None:
    said = sentences(effect(inserted=60.0), gate=0.043)
    assert "add runs/mine New --gate 0.043" in said and "at most 1 in 100" in said and "Old 0.4" in said
    assert "undo" not in said and "pipeline undo runs/mine` takes New back" in sentences(
        effect(60.0, scores=(80.0, 70.0)), gate=0.04
    )


def test_where_the_set_is_nearer_than_the_own_one_no_gate_is_promised() -> None:
    said = sentences(effect(inserted=70.0, first=70.0), gate=0.04)
    assert "questions differently" in said and "--gate" not in said


def test_where_the_set_comes_beside_the_own_one_the_share_is_named_as_a_gate_is() -> None:
    limit = Limit("share", 0.62, {"Old": 0.4})
    said = " ".join(advice(Interference([effect(60.0)], limit), RUN, "New"))
    assert "add runs/mine New --share 0.62" in said and "at most 1 in 100" in said


def test_where_another_router_tells_the_tasks_apart_it_is_named_with_its_command() -> None:
    found = Interference([effect(70.0, first=70.0)], router="prototype", remedy=Remedy("random_ridge", {"Old": 0.2}))
    (said,) = advice(found, RUN, "New")
    assert "as the router prototype compares them" in said and "questions differently" not in said
    assert "run runs/mine/config.yaml --set method.router=random_ridge`" in said and "Old 0.2" in said
    assert found.advised_json()["router"] == {"name": "random_ridge", "first": {"Old": 0.2}}


def test_other_sets_of_earlier_tasks_and_questions_of_the_new_one_are_told() -> None:
    moved = Effect("Old", 50, True, inserted=1.0, first=0.0, changed=9.0)
    found = Interference([moved], own={"New": 80.0, "Old": 19.5, "Other": 0.5}, router="ridge")
    others, own = advice(found, RUN, "New")
    assert others.startswith("Old 8.0 percent: get other sets of earlier tasks") and "ridge" in others
    assert own.startswith("New: 80.0 percent of its own") and own.endswith("to those of Old 19.5.")
    assert advice(Interference([], own={"New": 99.0, "Old": 1.0}), RUN, "New") == []


def test_of_many_tasks_the_table_lists_those_that_are_touched_most() -> None:
    effects = [Effect(f"t{n}", 10, True, inserted=float(n), first=0.0, changed=float(n)) for n in range(LISTED + 30)]
    table = effect_table(effects, "New")
    names = list(table.columns[0].cells)
    assert len(names) == LISTED + 1 and names[0] == "t30" and names[-1] == "30 others, at most"
    assert list(table.columns[2].cells)[-1] == "29.0" and list(table.columns[1].cells)[-1] == "300"


def test_no_gate_is_named_by_a_score_on_a_test_set() -> None:
    assert sentences(effect(inserted=2.0, scores=(80.0, 10.0)), gate=0.04) == ""


def test_what_the_shares_are_of_is_said() -> None:
    assert "held-out samples" in basis([effect(1.0)], "New") and "test" not in basis([effect(1.0)], "New")
    assert "training samples (this run holds none out" in basis([effect(1.0, held_out=False)], "New")
    assert "scores are those on the test sets" in basis([effect(1.0, scores=(1.0, 1.0))], "New")
