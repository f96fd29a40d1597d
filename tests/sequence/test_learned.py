"""`add` says when a task was not learned, by its held-out samples, and names what may be the reason."""

from __future__ import annotations

import pytest

from pipeline.config.load import load_recipe
from pipeline.sequence.learned import Learned, sentences


def found(score: float, majority: float = 40.0, free: float | None = None, samples: int = 300) -> Learned:
    return Learned("Boxes", 50, score, majority, free, trained_on=samples)


def said(scores: Learned, recipe: str = "nano", *sets: str) -> str:
    (sentence,) = sentences(scores, load_recipe(recipe, sets))
    return sentence


@pytest.mark.parametrize("score", [0.0, 39.9, 40.0])
def test_a_task_whose_set_is_no_better_than_one_answer_was_not_learned(score: float) -> None:
    sentence = said(found(score))
    assert sentence.startswith("Boxes was not learned: on its 50 held-out samples")
    assert f"its own module scores {score:.1f}" in sentence and "given to all of them, 40.0" in sentence
    assert not found(score).learned


def test_the_loss_of_the_stage_is_told_with_it() -> None:
    (sentence,) = sentences(found(0.0), load_recipe("nano"), [12.607, 10.2, 6.321])
    assert "went from 12.61 to 6.32. It may be because" in sentence
    assert "loss went" not in said(found(0.0))


def test_nothing_is_said_of_a_task_that_was_learned() -> None:
    assert found(40.1).learned and sentences(found(40.1), load_recipe("nano")) == []


def test_a_right_answer_in_the_wrong_format_is_named_as_that() -> None:
    assert "70.0 percent are right but for case" in said(found(10.0, free=70.0))
    assert "right but for case" not in said(found(10.0, free=40.0))


def test_answers_that_recur_are_what_an_answer_head_is_for() -> None:
    scores = Learned("Boxes", 50, 0.0, 40.0, None, 300, recurring=96.0)
    advice = "96 percent of which several training samples have"
    assert advice in said(scores) and "config.yaml --set method.answer_head=ridge`" in said(scores)
    for unfit in (["method.answer_head=ridge"], ["method.selection=all"], ["method.name=lora"]):
        assert advice not in said(scores, "nano", *unfit)
    # Nor where the advised command would be refused.
    vllm = ["evaluate.engine=vllm", "evaluate.vllm_url=http://127.0.0.1:1"]
    for unfit in (["method={name: core_moe}"], ["method={name: dualprompt}"], vllm):
        assert advice not in said(scores, "nano", *unfit)
    assert advice in said(scores, "nano", "method={name: hide}")
    assert "several training samples" not in said(found(0.0))


def test_few_passes_over_the_samples_are_a_reason_and_many_are_none() -> None:
    few = said(found(0.0, samples=2400), "nano", "train.steps=150")
    assert "the stage passed 1.0 times over 2400 samples; raise train.steps" in few
    assert "passed" not in said(found(0.0, samples=300), "nano", "train.steps=150")
    assert "raise train.epochs" in said(found(0.0, samples=300), "nano", "train.epochs=2")


def test_few_samples_are_named_as_what_they_are() -> None:
    few = said(Learned("Boxes", 2, 0.0, 50.0, None, trained_on=46))
    assert "So few samples say little" in few and "46 training samples are few" in few
    assert "few" not in said(found(0.0))


def test_the_embedded_model_is_named_as_what_has_never_seen_a_photograph() -> None:
    assert "check smolvlm_256m_own" in said(found(0.0))
    other = said(found(0.0), "smolvlm_256m_own")
    assert "embedded" not in other and "at most 64 tokens (model.image_tokens)" in other


def test_without_held_out_samples_it_is_said_that_nothing_is_known() -> None:
    (sentence,) = sentences(None, load_recipe("nano"))
    assert sentence.startswith("Boxes holds no samples out") and "not known" in sentence


def test_the_scores_go_through_json_unchanged() -> None:
    scores = found(12.5, free=20.0)
    assert Learned.from_json(scores.to_json()) == scores and scores.to_json()["learned"] is False
