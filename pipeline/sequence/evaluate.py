"""Evaluation of one task: predictions on plain replicas, split over the ranks, and their score."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pipeline.backbones.lmm import LMM
from pipeline.data.collate import Examples, StageData
from pipeline.data.grouped_order import image_groups
from pipeline.data.texts import Texts
from pipeline.errors import Interrupted
from pipeline.prompts.generation import PLAIN, Conditions, Decoding, InsertedSets, generate_answers
from pipeline.prompts.pool import PromptPool
from pipeline.prompts.routing import NO_SET, similarities
from pipeline.ranks.world import World, gather_objects, on_main
from pipeline.sequence.predictions import (
    PROJECTOR,
    SETS_FILE,
    UNFINISHED_FILE,
    finished_score,
    identity_of,
    keep_answers,
    known_answers,
    scored_lines,
    write_if_other,
    write_score,
)


@dataclass(frozen=True)
class Test:
    """One task's test set."""

    __test__ = False  # not a test case, whatever its name suggests to pytest

    name: str
    metric: str
    max_new_tokens: int
    data: StageData
    scoring: str = "fixed"
    unanswered: frozenset[int] = frozenset()  # indices of samples too long for the model, see data.too_long

    @functools.cached_property
    def texts(self) -> Texts:
        """Question, answer and meta of every sample, read at most once."""
        return Texts(self.data)


@dataclass(frozen=True)
class AnswerSettings:
    """How answers are given, beside the sets that are inserted.

    `projector` is the fingerprint of a trained image projector, an answer's third ingredient, "" where it is the base
    model's. `share_images` computes an image once for all questions about it that get the same sets; the insertion
    after_image does so anyway. `made_by` are fingerprints of the base model and of what else its checkpoint says, under
    names of their own.
    """

    batch: int
    insertion: str = "after_bos"
    projector: str = ""
    share_images: bool = False
    made_by: Mapping[str, str] = field(default_factory=dict)


def evaluate_task(
    lmm: Callable[[], LMM],
    test: Test,
    pool: PromptPool,
    route: Callable[[], tuple[Tensor, Tensor]],
    world: World,
    folders: Sequence[Path],
    settings: AnswerSettings,
    conditions: Conditions = PLAIN,
) -> float:
    """Score a test set after a stage, write its predictions, and return its score in percent.

    `route` gives the samples' sets [N, m] and similarities [N, T]. The first of the `folders` takes the predictions;
    answers that an evaluation in the others got with the same sets are taken from there. What is
    there and whole is neither read nor computed again. `lmm` is called only if something has to be generated.
    `conditions.go_on` is asked before every batch, by all ranks together, and has to tell all of them the same: after a
    no the answers that are there are kept for the next attempt, and Interrupted is raised.
    """
    folder, path = folders[0], folders[0] / f"{test.name}.jsonl"
    prints = {name: pool.fingerprint(index) for index, name in enumerate(pool.names)}
    made_with = {"data": test.data.fingerprint, "max_new_tokens": test.max_new_tokens, "insertion": settings.insertion}
    made_with |= settings.made_by
    sets = {**prints, PROJECTOR: settings.projector} if settings.projector else prints
    routed = list[tuple[Tensor, Tensor]]()

    def finished() -> float | None:
        routed.append(route())
        return finished_score(folder, test, made_with, sets, identity_of(test, pool, routed[0][0], settings.projector))

    # By rank 0 alone: another rank may see other files, and would wait for answers that nobody else generates.
    score = on_main(world, finished)
    if score is not None:
        return score
    selected, scores = routed[0] if world.main else route()
    chosen = [[pool.names[number] for number in row if number != NO_SET] for row in selected.tolist()]
    wanted = [(settings.projector, *(prints[name] for name in row)) for row in chosen]
    answers: dict[int, str] = {}  # on rank 0 all, on others those of this attempt

    def look() -> list[int]:
        known = known_answers(test.name, folders, made_with)
        wants = [(identity, wanted[index]) for index, identity in enumerate(test.data.ids)]
        answers.update({index: known[want] for index, want in enumerate(wants) if want in known})
        answers.update(dict.fromkeys(test.unanswered, ""))
        return [index for index in range(len(wants)) if index not in answers]

    missing = on_main(world, look)
    if missing:
        model = lmm()
        sharing = _sharing(model, settings.insertion, settings.share_images)
        examples = Examples(test.data, model.conversation, sharing, once=True, answered=False)
        share = _share_of(missing, examples, world)
        rounds = _Rounds(max(gather_objects(-(-len(share) // settings.batch))), conditions.go_on)
        bar = f"answering {test.name}" if world.main else None
        mine = generate_answers(
            model,
            examples,
            share,
            InsertedSets(pool.prompts, selected, settings.insertion),
            Decoding(test.max_new_tokens, settings.batch),
            replace(conditions, bar=bar, go_on=rounds.go_on),
        )
        rounds.finish()
        given = 0
        for part in gather_objects(mine):
            answers.update(part)
            given += len(part)
        # Before anything is made of them: a metric that fails, or a full disk, must not cost the answers.
        on_main(world, lambda: keep_answers(folder, test, answers, wanted, made_with))
        if rounds.stopped:
            raise Interrupted(
                f"Stopped by a signal while {test.name} was evaluated, with {len(wanted) - len(missing) + given} of "
                f"{len(wanted)} answers, which are kept. Run the same command again to go on."
            )

    def write() -> float:
        lines, scored = scored_lines(test, answers, chosen, scores)
        write_if_other(folder / SETS_FILE, json.dumps(sets, indent=2, ensure_ascii=False) + "\n")
        content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_if_other(path, content)
        write_score(folder, test, scored, made_with, sets, identity_of(test, pool, selected, settings.projector))
        (folder / UNFINISHED_FILE.format(test.name)).unlink(missing_ok=True)
        return scored.percent

    return on_main(world, write)


class _Rounds:
    """One batch of every rank is a round, between which all may stop; one without batches takes part all the same."""

    def __init__(self, rounds: int, go_on: Callable[[], bool]) -> None:
        self.left, self.stopped, self._go_on = rounds, False, go_on

    def go_on(self) -> bool:
        self.left -= 1
        self.stopped = self.stopped or not self._go_on()
        return not self.stopped

    def finish(self) -> None:
        """Take part in the rounds that other ranks still have."""
        while self.left > 0 and not self.stopped:
            self.go_on()


def _sharing(lmm: LMM, insertion: str, share_images: bool) -> Literal["none", "image", "sets"]:
    """Which samples of a batch share what they begin with, see `Examples`."""
    if insertion != "after_image" and not share_images:
        return "none"
    lmm.require_two_passes("evaluate.share_images: true" if insertion != "after_image" else "")
    return "image" if insertion == "after_image" else "sets"


def _share_of(missing: list[int], examples: Examples, world: World) -> list[int]:
    """The samples that this rank answers: every world.size-th, so that each rank gets a similar mix of lengths.

    Where samples share images, those of one image (neighbours, by their keys) go to one rank.
    """
    if examples.sharing == "none" or world.size == 1:
        return missing[world.rank :: world.size]
    groups = image_groups(examples.data.keys)[missing]
    return [index for index, group in zip(missing, groups, strict=True) if group % world.size == world.rank]


def task_similarity(test: Test, pool: PromptPool, image_weight: float) -> Tensor:
    """Similarities [N, T] of a test set's samples to the pool's prototypes."""
    if not len(pool):
        return torch.zeros(len(test.data), 0)
    return similarities(test.data.keys, pool.prototypes.cpu(), image_weight)
