"""Scores of single answers: what counts as right, and what must not."""

import pytest

from pipeline.errors import UserError
from pipeline.metrics.answers import levenshtein
from pipeline.metrics.boxes import box_iou, parse_box
from pipeline.metrics.evalai import normalise
from pipeline.metrics.letters import option_letter
from pipeline.metrics.metric import PerAnswer
from pipeline.metrics.scoring import metric_names, metric_of, score


@pytest.mark.parametrize("metric", [name for name in metric_names() if isinstance(metric_of(name), PerAnswer)])
def test_every_metric_gives_one_for_the_answer_itself_and_zero_for_another(metric: str) -> None:
    boxes = ("iou", "grounding")
    right, wrong = ("[0.1,0.2,0.5,0.6]", "[0.6,0.7,0.9,0.9]") if metric in boxes else ("B", "D")
    if metric == "iou_compat":
        right, wrong = "[0.10,0.20,0.50,0.600]", "[0.60,0.70,0.90,0.900]"
    assert score(metric, right, right) == 1.0
    assert score(metric, wrong, right) == 0.0
    assert score(metric, "", right) == 0.0


def test_an_unknown_metric_names_the_nearest_one() -> None:
    with pytest.raises(UserError, match=r"'exat'.*Did you mean 'exact'"):
        score("exat", "a", "a")


@pytest.mark.parametrize(
    ("prediction", "strict", "loose"),
    [("red", 1, 1), (" red\n", 1, 1), ("RED", 0, 1), ("red.", 0, 1), ("red red", 0, 0), ("red..", 0, 0)],
)
def test_exact_is_strict_about_case_and_exact_ci_is_not(prediction: str, strict: float, loose: float) -> None:
    assert score("exact", prediction, "red") == strict
    assert score("exact_ci", prediction, "red") == loose


@pytest.mark.parametrize(
    ("prediction", "right"),
    [("a tabby cat", 1), ("cat", 1), ("ca", 1), ("", 0), ("  ", 0), ("dog", 0), ("Cat", 0)],
)
def test_contains_accepts_a_substring_either_way_but_no_empty_text(prediction: str, right: float) -> None:
    assert score("contains", prediction, "cat") == right


@pytest.mark.parametrize(
    "text",
    ["[0.1,0.2,0.5,0.6]", "0.1 0.2 0.5 0.6", "(.1, .2), (.5, .6)", "box: [0.5, 0.6, 0.1, 0.2]", "[1e-1,.2,5e-1,.6]"],
)
def test_a_box_is_read_however_its_four_numbers_are_written(text: str) -> None:
    assert parse_box(text) == pytest.approx((0.1, 0.2, 0.5, 0.6))
    assert score("iou", text, "", {"answer_bbox": [0.1, 0.2, 0.5, 0.6]}) == 1.0


@pytest.mark.parametrize("text", ["", "no box", "[0.1,0.2,0.5]", "[0.1,0.2,0.5,0.6,0.7]", "[a,b,c,d]", "nan,nan"])
def test_a_text_without_exactly_four_numbers_is_no_box(text: str) -> None:
    assert parse_box(text) is None
    assert score("iou", text, "[0.1,0.2,0.5,0.6]") == 0.0


def test_a_box_counts_from_one_half_on() -> None:
    truth = {"answer_bbox": "[0, 0, 1, 1]"}
    assert score("iou", "[0,0,1,0.5]", "", truth) == 1.0
    assert score("iou", "[0,0,1,0.49]", "", truth) == 0.0
    assert score("iou_compat", "[00,0,1,0.50]", "", truth) == 0.0  # the published score wants more than one half


def test_boxes_without_an_area_do_not_divide_by_zero() -> None:
    assert box_iou((0.5, 0.5, 0.5, 0.5), (0.5, 0.5, 0.5, 0.5)) == 0.0


def test_the_published_grounding_score_loses_the_outer_characters() -> None:
    truth = "[0.00,0.50,0.10,0.78]"
    found = "[0.00,0.50,0.10,0.68]"  # read as .00 and 0.6: the intersection falls below one half
    assert score("iou", found, truth) == 1.0
    assert score("iou_compat", found, truth) == 0.0


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" B\n", "B"),
        ("B. iron", "B"),
        ("A force acts. The answer is C.", "C"),
        ("The answer is C. The answer is D.", "C"),  # two such sentences: the first single-character word
        ("option b", "B"),
        ("It is D", "D"),
        ("I think D", None),  # the first single-character word decides, and I is no option
        ("", None),
        ("ABC", None),
        ("none of these", None),
    ],
)
def test_the_chosen_letter_is_read_as_llava_and_coin_do(text: str, letter: str | None) -> None:
    assert option_letter(text) == letter


def test_a_letter_beyond_the_choices_is_wrong() -> None:
    assert score("scienceqa", "C", "C", {"options": ["x", "y", "z"]}) == 1.0
    assert score("scienceqa", "C", "C", {"options": ["x", "y"]}) == 0.0


@pytest.mark.parametrize(("agreeing", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_soft_accuracy_leaves_each_annotator_out_in_turn(agreeing: int, expected: float) -> None:
    answers = ["two"] * agreeing + [f"other {i}" for i in range(10 - agreeing)]
    assert score("vqa", "2", "", {"answers": answers}) == pytest.approx(expected)
    assert score("vqa", "2", "", {"answers": [{"answer": text} for text in answers]}) == pytest.approx(expected)


def test_soft_accuracy_with_one_annotator_is_a_match() -> None:
    assert score("vqa", "The Red.", "red") == 1.0
    assert score("vqa", "blue", "red") == 0.0


def test_no_more_than_32_full_stops_are_stripped() -> None:
    assert normalise("." * 40) == "." * 8


def test_anls_takes_the_best_reference_and_drops_poor_readings() -> None:
    answers = {"answers": ["Hello", "xyz"]}
    assert score("anls", "hallo ", "", answers) == pytest.approx(0.8)
    assert score("anls", "hq", "", answers) == 0.0
    assert score("anls", "", "", {"answers": [""]}) == 1.0


@pytest.mark.parametrize(
    ("first", "second", "edits"), [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2)]
)
def test_levenshtein_counts_single_character_edits(first: str, second: str, edits: int) -> None:
    assert levenshtein(first, second) == levenshtein(second, first) == edits
