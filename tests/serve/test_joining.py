"""Requests that join and leave at every step get the answers that they get alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from pipeline.adapter.answering import Answerer, Question
from pipeline.serve.request import Request, Update
from pipeline.serve.worker import Worker
from tests.adapters import question


@dataclass(eq=False)
class Asked:
    """A question with the most tokens of its answer, the turn at which it comes, and what was told about it."""

    question: Question
    longest: int
    turn: int
    followed: bool
    told: list[Update] = field(default_factory=list)


def questions() -> list[Asked]:
    """Two questions at every turn, short and long ones with short and long answers."""
    return [
        Asked(
            question(number % 3, variant=(7 * number) % 40, with_image=number % 4 > 0),
            longest=1 + (5 * number) % 13,
            turn=number // 2,
            followed=number % 3 == 0,
        )
        for number in range(24)
    ]


@pytest.mark.parametrize("slots", [1, 5, 32])
def test_answers_are_those_of_each_question_alone(
    answerer: Answerer, monkeypatch: pytest.MonkeyPatch, slots: int
) -> None:
    monkeypatch.setattr("pipeline.serve.worker.SLOTS", slots)
    asked, worker = questions(), Worker(answerer, 64, 64)
    for turn in range(200):
        for one in asked:
            if one.turn == turn:
                tokenised = answerer.tokenise(one.question)
                worker.submit(Request(tokenised, one.longest, one.told.append, followed=one.followed))
        worker._turn(worker._chosen())
        if turn > max(one.turn for one in asked) and not worker._rows():
            break
    assert worker.largest > 5  # they were answered together
    for one in asked:
        expected = answerer.answer([one.question], max_new_tokens=one.longest)[0]
        last = one.told[-1]
        assert (last.text, last.error) == (expected.text, None)
        assert last.finish in ("stop", "length") and last.completion_tokens <= one.longest
        # One whose answer nobody follows is told twice: that it has begun, and that it has ended.
        assert len(one.told) == (last.completion_tokens if one.followed else min(2, last.completion_tokens))


def test_stop_texts_end_an_answer_that_nobody_follows(answerer: Answerer) -> None:
    whole = answerer.answer([question(0)], max_new_tokens=6)[0].text
    stop, told, worker = whole[1:3], list[Update](), Worker(answerer, 4, 4)
    worker.submit(Request(answerer.tokenise(question(0)), 6, told.append, (stop,), followed=False))
    while worker._waiting or worker._rows():
        worker._turn(worker._chosen())
    assert (told[-1].text, told[-1].finish) == (whole[: whole.find(stop)], "stop")


def test_no_more_than_some_requests_join_at_one_step(answerer: Answerer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.serve.worker.JOINING", 3)
    worker, told = Worker(answerer, 64, 64), list[Update]()
    for number in range(8):
        worker.submit(Request(answerer.tokenise(question(number % 3)), 6, told.append))
    joined = []
    while worker._waiting:
        waiting = worker.waiting
        worker._turn(worker._chosen())
        joined.append(waiting - worker.waiting)
    assert joined == [3, 3, 2]
