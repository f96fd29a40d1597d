"""Scores of one predicted answer, in [0, 1]; pipeline/metrics/named.py makes the metrics from them.

Each task of a benchmark has a metric of its name. Its counterpart in pipeline/metrics/compat.py scores as the published
scripts do. Metrics of a whole test set, such as CIDEr, are in captions.py.
"""

from typing import Any

from pipeline.metrics.evalai import normalise
from pipeline.metrics.letters import choices, option_letter, true_letter

Meta = dict[str, Any]

ANLS_THRESHOLD = 0.5  # ST-VQA: a normalised similarity below one half counts as a wrong reading


def exact(prediction: str, answer: str, meta: Meta) -> float:
    """1 when the texts are equal; only outer white space is ignored, case counts."""
    return float(prediction.strip() == answer.strip())


def exact_ci(prediction: str, answer: str, meta: Meta) -> float:
    """1 when the texts are equal without case, outer white space and a final full stop.

    For CoIN's GQA, VizWiz and VQAv2 (one answer each) and OCR-VQA (docs/design.md 6.1).
    """
    return float(_plain(prediction) == _plain(answer))


def contains(prediction: str, answer: str, meta: Meta) -> float:
    """1 when one of the two texts contains the other; case counts, and an empty text scores 0.

    For CoIN's ImageNet, without the script's fault of scoring empty predictions as right (docs/design.md 4.10, F3).
    """
    found, wanted = prediction.strip(), answer.strip()
    return float(bool(found) and bool(wanted) and (found in wanted or wanted in found))


def scienceqa(prediction: str, answer: str, meta: Meta) -> float:
    """1 when the prediction chooses the letter of the answer; 0 when it chooses none.

    The answer is a letter, or one of the sample's `options` (also called `choices`), of which there may be fewer than
    five.
    """
    letter = option_letter(prediction, choices(meta))
    return float(letter is not None and letter == true_letter(answer, meta))


def vqa(prediction: str, answer: str, meta: Meta) -> float:
    """Soft accuracy: mean over the annotators of min(1, agreeing others / 3), texts normalised as EvalAI does.

    The annotators' answers are `meta["answers"]` (texts, or `{"answer": text}`); with a single one it is a plain match.
    The official score of TextVQA, VQAv2 and VizWiz; source: TextVQA's M4C evaluator (docs/design.md 6.1).
    """
    answers = [normalise(text) for text in references(answer, meta)]
    found = normalise(prediction)
    if len(answers) == 1:
        return float(found == answers[0])
    agreeing = answers.count(found)
    others = [agreeing - (text == found) for text in answers]
    return sum(min(1.0, count / 3) for count in others) / len(answers)


def anls(prediction: str, answer: str, meta: Meta) -> float:
    """The best normalised Levenshtein similarity over `meta["answers"]`, without case; below 0.5 it counts as 0."""
    return max(_similarity(prediction, text) for text in references(answer, meta))


def references(answer: str, meta: Meta) -> list[str]:
    """The true answers of a sample: `meta["answers"]` (texts, or `{"answer": text}`), or its answer without them."""
    answers = meta.get("answers") or [answer]
    return [str(item["answer"] if isinstance(item, dict) else item) for item in answers]


def levenshtein(first: str, second: str) -> int:
    """Return the smallest number of single-character edits that turn one text into the other."""
    row = list(range(len(second) + 1))
    for i, left in enumerate(first, start=1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(second, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


def _similarity(prediction: str, answer: str) -> float:
    found, wanted = prediction.strip().lower(), answer.strip().lower()
    longest = max(len(found), len(wanted))
    if longest == 0:
        return 1.0
    similarity = 1.0 - levenshtein(found, wanted) / longest
    return similarity if similarity >= ANLS_THRESHOLD else 0.0


def _plain(text: str) -> str:
    return text.strip().removesuffix(".").strip().casefold()
