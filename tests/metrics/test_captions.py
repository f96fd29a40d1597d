"""Caption scores of a whole test set."""

import pytest

from pipeline.errors import UserError
from pipeline.metrics import captions
from pipeline.metrics.captions import PARTS, caption_scores, tokenise
from pipeline.metrics.scoring import Answered, require_metrics, score_task

DOG, CATS, CAR = "a brown dog runs on the grass", "two cats sit on a sofa", "a red car drives down the road"


@pytest.fixture
def package() -> None:
    pytest.importorskip(captions.PACKAGE)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A man's dog isn't running, it's sleeping.", "a man 's dog is n't running it 's sleeping"),
        ("Two t-shirts - red & blue -- hang on a line!", "two t-shirts red & blue hang on a line"),
        (
            "A bottle of 7up costs $5.50, 50% off; 1,000 left at 3:30 p.m.",
            "a bottle of 7up costs $ 5.50 50 % off 1,000 left at 3:30 p.m.",
        ),
        ("He can't, won't, couldn't've; they cannot.", "he ca n't wo n't could n't 've they can not"),
        ("The sign says 'STOP' and/or \"go\"...", "the sign says stop and/or go"),
        ("  ", ""),
    ],
)
def test_captions_are_split_as_the_penn_treebank_does(text: str, words: str) -> None:
    assert tokenise(text) == words


@pytest.mark.usefixtures("package")
class TestScores:
    def test_the_true_captions_get_the_highest_scores(self) -> None:
        totals, each = caption_scores([DOG, CATS, CAR], [[DOG], [CATS], [CAR]])
        assert totals == {name: pytest.approx(10.0 if name == "cider" else 1.0, abs=1e-6) for name in PARTS}
        assert each["cider"] == pytest.approx([10.0] * 3)

    def test_bleu_counts_over_the_corpus_with_its_brevity_penalty(self) -> None:
        # 4 of 4 words and 3 of 3 pairs are right, against a reference of 7 words: exp(1 - 7/4).
        totals, _ = caption_scores(["a brown dog runs"], [[DOG]])
        assert [totals["bleu_1"], totals["bleu_2"]] == pytest.approx([2.718281828 ** (1 - 7 / 4)] * 2)

    def test_rouge_l_weighs_recall_more_than_precision(self) -> None:
        # The common subsequence has 4 words: precision 1, recall 4/7, beta 1.2.
        totals, _ = caption_scores(["a brown dog runs"], [[DOG]])
        assert totals["rouge_l"] == pytest.approx((1 + 1.44) * (4 / 7) / (4 / 7 + 1.44))

    def test_the_best_of_several_references_counts(self) -> None:
        totals, _ = caption_scores([DOG, CATS], [["something else", DOG], [CATS, "other words"]])
        assert totals["bleu_4"] == pytest.approx(1.0) == totals["rouge_l"]

    def test_cider_gives_nothing_for_words_that_every_caption_has(self) -> None:
        _, each = caption_scores(["a the", "a dog", "the car"], [["a the dog"], ["a the cat"], ["a the car"]])
        assert each["cider"][:2] == [0.0, 0.0]
        assert each["cider"][2] > 0.0  # of the three, only this one names what its reference names

    def test_empty_captions_score_zero_and_stay_finite(self) -> None:
        totals, _ = caption_scores(["", ""], [[DOG], [CATS]])
        assert totals == {name: pytest.approx(0.0, abs=1e-6) for name in PARTS}

    def test_a_task_gets_percent_and_every_measure_as_a_part(self) -> None:
        meta = {"answers": [DOG, "a dog"]}
        answered = [Answered(DOG, "", meta), Answered("two cats", CATS), Answered(CAR, CAR)]
        scored = score_task("caption", answered)
        assert set(scored.parts) == set(PARTS)
        assert scored.percent == pytest.approx(sum(scored.parts.values()) / len(PARTS))
        assert score_task("cider", answered).percent == scored.parts["cider"]
        assert score_task("bleu_4", answered).percent == scored.parts["bleu_4"]
        assert len(scored.points) == 3

    def test_a_percentage_beyond_100_fits_the_accuracy_matrix(self) -> None:
        from pipeline.metrics.continual import summarise

        percent = score_task("cider", [Answered(text, text) for text in (DOG, CATS, CAR)]).percent
        assert percent == pytest.approx(1000.0)
        assert summarise([[percent]])["last"] == percent


def test_a_missing_package_is_said_before_anything_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions, "find_spec", lambda name: None)
    require_metrics(["exact", "vqa"])
    with pytest.raises(UserError, match=r"need the package pycocoevalcap.*continual-prompts\[captions\]"):
        require_metrics(["exact", "cider"])
