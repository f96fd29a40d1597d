"""The eight scores of CoIN, as they should be (`fixed`) and as its scripts compute them (`compat`), trap by trap."""

import pytest

from pipeline.config.data import TaskConfig
from pipeline.metrics.metric import PerAnswer
from pipeline.metrics.scoring import Answered, metric_names, metric_of, score, score_task


def both(metric: str, prediction: str, answer: str, **meta: object) -> tuple[float, float]:
    """(fixed, compat)"""
    return score(metric, prediction, answer, meta), score(metric, prediction, answer, meta, "compat")


@pytest.mark.parametrize(
    ("prediction", "options", "expected"),
    [
        ("C", 5, (1, 1)),
        ("C. copper", 5, (1, 1)),
        ("option c", 5, (1, 1)),
        ("C) copper", 5, (1, 1)),
        ("It is D", 5, (0, 0)),
        ("copper", 5, (0, 0)),
        ("", 5, (0, 0)),
        ("C", 2, (0, 0)),  # there is no C among two choices
        ("A force acts. The answer is C.", 5, (1, 0)),  # CoIN reads the A
        ("The answer is C.", 5, (1, 1)),
        (" C", 5, (1, 1)),
    ],
)
def test_scienceqa_reads_the_letter(prediction: str, options: int, expected: tuple[float, float]) -> None:
    assert both("scienceqa", prediction, "C", choices=[f"option {n}" for n in range(options)]) == expected


def test_scienceqa_takes_the_text_of_an_option_for_its_letter() -> None:
    assert both("scienceqa", "B", "iron", options=["copper", "iron"]) == (1, 1)
    assert both("scienceqa", "A", "iron", options=["copper", "iron"]) == (0, 0)


def test_scienceqa_is_split_into_questions_with_and_without_an_image() -> None:
    answered = [
        Answered("A", "A", {}, has_image=True),
        Answered("B", "A", {}, has_image=True),
        Answered("A", "A", {}, has_image=False),
        Answered("none", "A", {}, has_image=True),
    ]
    scored = score_task("scienceqa", answered)
    assert scored.percent == 50.0
    assert scored.parts == {"image": pytest.approx(100 / 3), "text": 100.0}
    assert scored.points == [1, 0, 1, 0]


def test_a_test_set_that_always_has_an_image_has_no_parts() -> None:
    assert score_task("exact", [Answered("a", "a"), Answered("a", "b")]).parts == {}


def test_textvqa_is_soft_over_ten_annotators_in_both() -> None:
    answers = ["stop"] * 2 + ["stop sign"] * 8
    assert both("textvqa", "Stop.", "", answers=answers) == (pytest.approx(0.6), pytest.approx(0.6))
    assert both("textvqa", "the stop sign", "", answers=answers) == (1, 1)


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("tabby cat", (1, 1)),
        ("a tabby cat on a sofa", (1, 1)),
        ("cat", (1, 1)),
        ("", (0, 1)),  # an empty answer is part of every text (docs/design.md 4.10, F3)
        ("a", (1, 1)),  # any shared substring counts in both
        ("dog", (0, 0)),
        ("Tabby Cat", (0, 0)),
    ],
)
def test_imagenet_accepts_a_substring_either_way(prediction: str, expected: tuple[float, float]) -> None:
    assert both("imagenet", prediction, "tabby cat") == expected
    assert both("contains", prediction, "tabby cat") == expected


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("Yes", "yes", (1, 1)),
        ("yes.", "yes", (1, 1)),
        ("yes..", "yes", (0, 1)),
        ("yes", "Yes", (1, 0)),
        ("no", "yes", (0, 0)),
    ],
)
def test_gqa_ignores_case_and_a_final_full_stop(prediction: str, answer: str, expected: tuple[float, float]) -> None:
    assert both("gqa", prediction, answer) == expected


@pytest.mark.parametrize("metric", ["vizwiz", "vqav2"])
def test_vizwiz_and_vqav2_compare_with_their_one_answer_whatever_the_annotators_say(metric: str) -> None:
    annotators = {"answers": ["two"] * 10}
    assert both(metric, "UNANSWERABLE", "unanswerable", **annotators) == (1, 1)
    assert both(metric, "unanswerable.", "unanswerable", **annotators) == (1, 0)
    assert both(metric, "two", "unanswerable", **annotators) == (0, 0)


def test_the_official_soft_score_of_vizwiz_and_vqav2_is_a_metric_of_its_own() -> None:
    assert both("vqa", "2", "unanswerable", answers=["two"] * 3 + ["three"] * 7) == (pytest.approx(0.9),) * 2


def test_grounding_needs_more_than_one_half() -> None:
    assert score("grounding", "[0,0,1,0.5]", "[0, 0, 1, 1]") == 0.0
    assert score("iou", "[0,0,1,0.5]", "[0, 0, 1, 1]") == 1.0
    assert score("grounding", "[0,0,1,0.51]", "[0, 0, 1, 1]") == 1.0


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("[0.00,0.50,0.10,0.78]", (1, 1)),
        ("[0.00,0.50,0.10,0.68]", (1, 0)),  # .00 and 0.6 (docs/design.md 4.10, F2)
        ("The box is [0.00,0.50,0.10,0.78]", (1, 0)),
        ("[0.00,0.50,0.10]", (0, 0)),
        ("nothing", (0, 0)),
        ("", (0, 0)),
    ],
)
def test_grounding_in_the_published_scripts_loses_the_outer_characters(
    prediction: str, expected: tuple[float, float]
) -> None:
    assert both("grounding", prediction, "", answer_bbox="[0.00,0.50,0.10,0.78]") == expected
    assert score("iou_compat", prediction, "", {"answer_bbox": "[0.00,0.50,0.10,0.78]"}) == expected[1]


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("J. R. Author", "j. r. author", (1, 1)),
        ("Unanswerable", "Unanswerable", (1, 0)),  # skipped, but kept in the denominator (docs/design.md 4.10, F4)
        ("1998.", "1998", (1, 0)),
        ("1998", "1999", (0, 0)),
    ],
)
def test_ocrvqa_ignores_case(prediction: str, answer: str, expected: tuple[float, float]) -> None:
    assert both("ocrvqa", prediction, answer) == expected


def test_the_metrics_that_published_scripts_score_otherwise() -> None:
    metrics = {name: metric_of(name) for name in metric_names()}
    twins = {name for name, it in metrics.items() if isinstance(it, PerAnswer) and it.compat is not it.one}
    coin = {"scienceqa", "imagenet", "gqa", "vizwiz", "grounding", "vqav2", "ocrvqa"}
    assert twins == {"contains", "iou", *coin}


def test_the_switch_reaches_the_score_of_a_test_set() -> None:
    empty = [Answered("", "cat"), Answered("cat", "cat")]
    assert score_task("imagenet", empty).percent == 50.0
    assert score_task("imagenet", empty, "compat").percent == 100.0


def test_a_task_without_a_named_metric_is_scored_by_exact_match() -> None:
    assert TaskConfig(name="A").metric == "exact"
    assert {"exact", "scienceqa", "cider", "caption"} <= set(metric_names())
