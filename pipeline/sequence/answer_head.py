"""Makes the answer head of a finished stage: fitted to its training samples, weighed against the decoder on held-out
ones."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor

from pipeline.data.collate import Examples, collate
from pipeline.data.conversation import Conversation
from pipeline.data.selection import Selection
from pipeline.data.stage_data import StageData
from pipeline.prompts.answer_head import FITTED, AnswerHead, fit_head
from pipeline.prompts.answer_mix import HeldOut, fit_mix
from pipeline.prompts.answer_tree import said_along
from pipeline.prompts.routers.kept_keys import picked, sampled_rows
from pipeline.ranks.world import gather_objects, on_main
from pipeline.runs.session import Session
from pipeline.training.engine import Engine

log = logging.getLogger(__name__)
MOST = 500  # answers that a head knows, the most frequent ones
HELD_OUT = 200  # samples that it is weighed against the decoder with


def answer_head(
    engine: Engine,
    examples: Examples,
    held_out: StageData | None,
    selection: Selection,
    session: Session,
    task: str,
) -> dict[str, Tensor]:
    """What a finished stage keeps of its answer head; nothing where it has none. A collective.

    Args:
        engine: with the stage's final values.
        examples: the stage's training samples.
        held_out: samples of the same task that were not trained on; None: there are none.
        selection: the earlier modules of every held-out sample.
        session: the ranks, and the watchdog.
        task: its name, for messages.
    """
    rows = [] if held_out is None else _single_turns(held_out)
    if held_out is None or not rows:
        log.warning(
            "%s holds no samples of one turn out (it has too few, or data.validation_share is 0) to weigh an answer "
            "head against the decoder with, so it has none.",
            task,
        )
        return {}
    session.watchdog.beat(f"fitting the answer head of {task}", slow=True)
    head = on_main(session.world, lambda: _fitted(examples.data, examples.conversation))
    if head is None:
        log.info("%s: fewer than two answers recur in its training samples, so it has no answer head", task)
        return {}
    others = Examples(held_out, examples.conversation, examples.sharing)
    mine = list(_seen(engine, others, rows, selection, head, session))
    seen = [answer for part in gather_objects(mine) for answer in part]
    mix = on_main(session.world, lambda: fit_mix(seen))
    log.info(
        "%s: answer head of %d answers; of known tokens the decoder's probabilities count to the power %.2f and its "
        "own to %.2f; whether it is one of them, by %.2f times the decoder's log-odds plus %.2f (%d held-out samples)",
        *(task, len(head.tokens), *mix, len(seen)),
    )
    return dataclasses.replace(head, mix=mix).state


def _fitted(data: StageData, conversation: Conversation) -> AnswerHead | None:
    """The head of a task's training samples; of samples with further turns the first answer counts for nothing."""
    used = torch.arange(len(data)) if data.used is None else torch.from_numpy(data.used)
    rows = used[sampled_rows(len(used), FITTED)].tolist()
    texts = {row: sample for row in rows if not (sample := data.text(row)).meta.get("turns")}
    counts = Counter(sample.answer.strip() for sample in texts.values())
    known = {answer for answer, count in counts.most_common(MOST) if count > 1}
    pictured, numbers = data.keys.has_image, dict[tuple[int, ...], int]()
    places: dict[str, int] = {}
    for row, sample in texts.items():
        answer = sample.answer.strip()
        if answer in known and answer not in places:
            tokens = tuple(conversation.answer(sample, bool(pictured[row])))
            places[answer] = numbers.setdefault(tokens, len(numbers))
    if len(numbers) < 2:
        return None
    of_known = [(row, places[answer]) for row, sample in texts.items() if (answer := sample.answer.strip()) in places]
    keys = picked(data.keys, torch.tensor([row for row, _ in of_known]))
    return fit_head(keys, list(numbers), torch.tensor([place for _, place in of_known]))


@torch.no_grad()
def _seen(
    engine: Engine, examples: Examples, rows: list[int], selection: Selection, head: AnswerHead, session: Session
) -> Iterator[HeldOut]:
    """This rank's share of what head and decoder say along the answers of these held-out samples.

    Every rank computes as many batches, the last perhaps of samples that do not count, because ZeRO-3 gathers weights
    by collectives.
    """
    world, data, size = session.world, examples.data, engine.micro_batch
    own = rows[world.rank :: world.size]
    count = -(-len(rows) // (world.size * size))
    with _answering(engine):
        for number in range(count):
            session.watchdog.beat(f"held-out samples of the answer head, {number + 1} of {count}")
            part = own[number * size : (number + 1) * size]
            filled = [*part, *rows[:1] * (size - len(part))]
            batch = collate(examples, filled, [1.0] * size, selection).to(world.device)
            said = engine.module.said(batch)
            lengths = (batch.labels[:, 1:] != -100).sum(1).tolist()
            logits, answers = said.logits.split(lengths), said.targets.split(lengths)
            weighings = head.weighing(picked(data.keys, torch.tensor(part, dtype=torch.long))) if part else []
            for weighing, answer, scores in zip(weighings, answers, logits, strict=False):
                yield said_along(weighing, answer.tolist(), scores)


def _single_turns(data: StageData) -> list[int]:
    """At most `HELD_OUT` samples that are used and have no further turns."""
    used = range(len(data)) if data.used is None else data.used.tolist()
    single = [row for row in used if not data.text(row).meta.get("turns")]
    return [single[place] for place in sampled_rows(len(single), HELD_OUT).tolist()]


@contextlib.contextmanager
def _answering(engine: Engine) -> Iterator[None]:
    """Without dropout."""
    training = engine.module.training
    engine.module.eval()
    try:
        yield
    finally:
        engine.module.train(training)
