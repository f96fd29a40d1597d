"""Questions that join a running batch by twos, and answers that must not depend on what else is in a batch."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.adapter.answering import Answerer, Question
from pipeline.serve.decoder import Running, RunningBatch


def joined_by_twos(
    answerer: Answerer, asked: Sequence[Question], tokens: int, leaving: int | None = None
) -> list[Running]:
    """The rows of these questions once all have ended; two join before every token, and row `leaving` is dropped."""
    batch, began = RunningBatch(answerer), list[Running]()
    while len(began) < len(asked) or batch.rows:
        batch.step()
        group = list(asked[len(began) : len(began) + 2])
        if group:
            new = [Running(len(began) + place, tokens) for place in range(len(group))]
            batch.begin(answerer.route(group), new)
            began += new
        if leaving is not None:
            batch.drop({leaving})
    return began


def require_same_answers_in_any_batch(answerer: Answerer, asked: Sequence[Question], tokens: int) -> None:
    """Asserts that questions are answered alike together, alone, and joining a batch that runs."""
    answers = [answer.text for answer in answerer.answer(asked, tokens)]
    assert answers == [answerer.answer([one], tokens)[0].text for one in asked]
    assert answers == [row.text for row in joined_by_twos(answerer, asked, tokens)]
