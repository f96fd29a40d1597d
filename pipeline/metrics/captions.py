"""Scores of captions over a whole test set: BLEU, ROUGE-L and CIDEr as the COCO caption evaluation computes them.

The scores are computed by the package pycocoevalcap. Its tokenizer needs Java, as METEOR does, so texts are split here
by the same conventions (Penn Treebank); scores may differ slightly from those with the package's own tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec

from pipeline.errors import UserError
from pipeline.metrics.answers import references
from pipeline.metrics.metric import Answered, Metric, TaskScore

PACKAGE = "pycocoevalcap"
BLEU = ("bleu_1", "bleu_2", "bleu_3", "bleu_4")
PARTS = (*BLEU, "rouge_l", "cider")
METRICS = ("bleu_4", "rouge_l", "cider", "caption")  # names of these metrics in a recipe, for messages

# Words as the Penn Treebank splits them, without punctuation; the first alternative that matches is taken.
_WORDS = re.compile(
    r"""
    \d+(?:[.,:]\d+)+              # 1,000  3:30  5.50
    | (?:[a-z]\.){2,}             # u.s.
    | n't\b | '(?:s|m|d|re|ve|ll)\b
    | [^\W_]+?(?=n't\b)           # is|n't
    | can(?=not\b)                # can|not
    | o'clock
    | [^\W_]+(?:[-_/][^\W_]+)*    # words, t-shirt, and/or, 7up
    | [^\w\s.?!,:;'"`()\[\]{}-]   # signs that count as words: $ % & #
    """,
    re.VERBOSE,
)


class Captions(Metric):
    """The mean of some of the measures in `PARTS` over a test set; the parts of its score are all six."""

    needs = (PACKAGE,)

    def __init__(self, measures: Sequence[str]) -> None:
        self.measures = tuple(measures)

    def require(self) -> None:
        require()

    def score(self, answered: Sequence[Answered], scoring: str) -> TaskScore:
        if not answered:
            return TaskScore(0.0, {}, [])
        totals, each = caption_scores(
            [item.prediction for item in answered], [references(item.answer, item.meta) for item in answered]
        )
        points = [
            sum(values) / len(self.measures) for values in zip(*(each[name] for name in self.measures), strict=True)
        ]
        percent = 100.0 * sum(totals[name] for name in self.measures) / len(self.measures)
        return TaskScore(percent, {name: 100.0 * value for name, value in totals.items()}, points)


def require() -> None:
    """Raise UserError, with the command that installs it, when the package behind these metrics is missing."""
    if find_spec(PACKAGE) is None:
        raise UserError(
            f"The metrics {', '.join(METRICS)} need the package {PACKAGE}, which is not installed; "
            'run `pip install "continual-prompts[captions]"`.'
        )


def caption_scores(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Return the score of the test set and those of its captions, for each measure in `PARTS` by name.

    `references[i]` are the true captions of sample i, at least one. BLEU and ROUGE-L are in [0, 1]. CIDEr is in
    [0, 10]; it weights words by their inverse document frequency, so it is 0 for a single sample. Raises UserError
    without the package.
    """
    require()
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    found = {number: [tokenise(text)] for number, text in enumerate(predictions)}
    wanted = {number: [tokenise(text) for text in texts] for number, texts in enumerate(references)}
    bleu, bleu_each = Bleu(4).compute_score(wanted, found, verbose=0)
    totals = dict(zip(BLEU, map(float, bleu), strict=True))
    each = {name: [float(value) for value in values] for name, values in zip(BLEU, bleu_each, strict=True)}
    for name, metric in (("rouge_l", Rouge()), ("cider", Cider())):
        total, values = metric.compute_score(wanted, found)
        totals[name], each[name] = float(total), [float(value) for value in values]
    return totals, each


def tokenise(text: str) -> str:
    """Return the words of a caption in lower case, one space apart, without punctuation."""
    return " ".join(_WORDS.findall(text.lower()))
