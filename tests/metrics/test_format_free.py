"""The second score ignores letter case, punctuation, articles and wrapping words, and nothing else."""

from __future__ import annotations

import pytest

from pipeline.metrics.format_free import format_free, format_free_percent, plain
from pipeline.metrics.metric import Answered, Corpus, TaskScore
from pipeline.metrics.scoring import metric_of, score_task


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        ("[Two]!", "two"),
        ("it is red.", "red"),
        ("It's red", "red"),
        ("answer: two.", "two"),
        ("The answer is: Two", "two"),
        ("Answer: it is a red circle.", "red circle"),
        ("two is the correct answer", "two"),
        ("There are three in the picture.", "three"),
        ("**B.**", "B"),
        ("(B)", "b"),
        ("Option B", "B"),
        ("`stop_sign`", "stop sign"),
        ("stop-sign", "Stop sign"),
        ("an apple", "The apple"),
        ("U.S.", "us"),
        ("1,000", "1000"),
        ("2.5.", "2.5"),
        ("“yes”", "yes"),
        ("\uff39\uff45\uff53", "yes"),  # full-width letters
        ("answer", "answer"),
        ("the", "the"),
        ("The answer is A", "a"),
        ("A", "a."),
    ],
)
def test_format_is_ignored(prediction: str, answer: str) -> None:
    assert format_free(prediction, answer) == 1.0, (plain(prediction), plain(answer))


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        ("red and blue or green", "red"),  # containing the word is not enough
        ("red circle", "red"),
        ("it is not red", "red"),
        ("the answer is not two", "two"),
        ("no", "yes"),
        ("two", "2"),  # number words are knowledge of another kind
        ("25", "2.5"),
        ("12", "1/2"),
        ("-4", "4"),
        (".5", "5"),
        ("10%", "10"),
        ("C#", "C"),
        ("10, 20", "1020"),
        ("", "two"),
        ("...", "two"),
        ("the answer is", "two"),
        ("is it red", "red"),
    ],
)
def test_anything_else_counts(prediction: str, answer: str) -> None:
    assert format_free(prediction, answer) == 0.0, (plain(prediction), plain(answer))


def test_any_of_several_true_answers_counts() -> None:
    assert format_free("It is Crimson.", "red", {"answers": ["red", {"answer": "crimson"}]}) == 1.0


def test_an_empty_answer_is_never_right() -> None:
    assert format_free("!", "?") == 0.0


def test_a_test_set_never_scores_less_than_by_its_metric() -> None:
    answered = [Answered("Two.", "two"), Answered("two", "two"), Answered("three", "two"), Answered("0.5", "two")]
    scored = score_task("exact", answered)
    assert scored.percent == 25.0
    assert format_free_percent(metric_of("exact"), answered, scored) == 50.0
    boxes = [Answered("[0.1, 0.1, 0.5, 0.5]", "[0.1, 0.1, 0.5, 0.6]")]
    overlap = score_task("iou", boxes)
    assert format_free_percent(metric_of("iou"), boxes, overlap) == pytest.approx(overlap.percent)


def test_a_metric_of_whole_test_sets_has_the_one_score() -> None:
    whole = Corpus(lambda answered: TaskScore(130.0, {}, [0.5 for _ in answered]))
    answered = [Answered("A dog.", "a dog")]
    assert format_free_percent(whole, answered, whole.score(answered, "fixed")) == 130.0
