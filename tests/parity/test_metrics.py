"""Answer metrics against scores recorded from the public reference evaluators (fixture folder: --fixtures DIR)."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.metrics.answers import anls, vqa
from pipeline.metrics.evalai import normalise
from pipeline.metrics.letters import LETTERS, option_letter
from pipeline.metrics.scoring import Answered, score, score_task


@pytest.fixture(scope="module")
def recorded(request: pytest.FixtureRequest) -> Any:
    folder = request.config.getoption("--fixtures")
    if not folder:
        pytest.skip("needs the recorded fixtures: pytest tests/parity --fixtures DIR")
    folder = Path(folder) / "metrics"
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing: this fixture folder has no metrics part")
    return lambda name: json.loads((folder / name).read_text(encoding="utf-8"))


def test_texts_are_normalised_as_evalai_does(recorded: Any) -> None:
    items = recorded("textvqa.json")["evalai_normalisation"]
    assert items
    assert [normalise(item["text"]) for item in items] == [item["normalised"] for item in items]


def test_soft_accuracy_equals_the_m4c_evaluators(recorded: Any) -> None:
    items = recorded("textvqa.json")["textvqa_soft_accuracy"]
    assert items
    scores = [vqa(item["prediction"], "", {"answers": item["answers"]}) for item in items]
    assert scores == pytest.approx([item["score"] for item in items], abs=1e-12)


def test_a_test_sets_accuracy_is_the_mean_of_the_recorded_scores(recorded: Any) -> None:
    items = recorded("textvqa.json")["textvqa_soft_accuracy"]
    scored = score_task("textvqa", [Answered(item["prediction"], "", {"answers": item["answers"]}) for item in items])
    assert scored.percent == pytest.approx(100 * sum(item["score"] for item in items) / len(items), abs=1e-9)


def test_anls_equals_the_m4c_evaluators(recorded: Any) -> None:
    items = recorded("textvqa.json")["anls"]
    assert items
    scores = [anls(item["prediction"], "", {"answers": item["answers"]}) for item in items]
    assert scores == pytest.approx([item["score"] for item in items], abs=1e-12)


def test_letters_are_read_from_real_outputs_as_llava_scored_them(recorded: Any) -> None:
    items = recorded("scienceqa_letters.json")["items"]
    assert items
    letters = [option_letter(item["output"]) for item in items]
    assert [LETTERS.index(letter) if letter else -1 for letter in letters] == [item["index"] for item in items]
    for item in items:
        right = [score("scienceqa", item["output"], letter, {}) for letter in LETTERS]
        assert right == [float(number == item["index"]) for number in range(len(LETTERS))]
