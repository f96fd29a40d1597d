"""The score of answering without looking."""

from __future__ import annotations

import pytest

from pipeline.data.sample import Sample
from pipeline.data.sample_list import SampleList
from pipeline.metrics import blind
from pipeline.metrics.blind import majority_score, recurring_share


def samples(*answers: str) -> SampleList:
    return SampleList(Sample(f"s{number}", None, "what?", answer, {}) for number, answer in enumerate(answers))


def test_the_most_frequent_training_answer_is_scored_on_the_test_samples() -> None:
    assert majority_score(samples("a", "b", "b", "c"), samples("b", "a", "b", "c"), "exact") == 50.0
    assert majority_score(samples("no", "No", "Yes", "Yes"), samples("yes", "no", "yes.", "x"), "exact_ci") == 50.0


def test_answers_that_occur_equally_often_are_decided_by_their_order() -> None:
    assert majority_score(samples("b", "a"), samples("b", "b"), "exact") == 100.0


def test_a_large_task_is_sampled_over_its_whole_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blind, "MOST_READ", 4)
    training = samples(*"a" * 3, *"b" * 9)
    assert majority_score(training, samples("b"), "exact") == 100.0


def test_answers_recur_that_at_least_two_training_samples_have() -> None:
    training = samples("a", "a", "b", "c", "c", "c")
    assert recurring_share(training, list(samples("a", "b", "c", "d"))) == 50.0
    assert recurring_share(training, []) == 0.0
