"""Evaluation of one task: predictions on plain replicas, split over the ranks, and their score."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pipeline.backbones.lmm import LMM
from pipeline.checkpoint import write_json
from pipeline.data.collate import Examples, StageData
from pipeline.data.grouped_order import image_groups
from pipeline.distributed import World, gather_objects, on_main
from pipeline.errors import Interrupted
from pipeline.files import replacing
from pipeline.generation import generate_answers
from pipeline.predictions import PROJECTOR, SETS_FILE, UNFINISHED_FILE, keep_answers, known_answers, scored_lines
from pipeline.prompts.pool import PromptPool
from pipeline.prompts.routing import NO_SET, similarities


@dataclass(frozen=True)
class Test:
    """One task's test set."""

    __test__ = False  # not a test case, whatever its name suggests to pytest

    name: str
    metric: str
    max_new_tokens: int
    data: StageData
    scoring: str = "fixed"


def evaluate_task(
    lmm: Callable[[], LMM],
    test: Test,
    pool: PromptPool,
    selected: Tensor,
    scores: Tensor,
    world: World,
    folder: Path,
    batch: int,
    earlier: Iterable[Path] = (),
    insertion: str = "after_bos",
    projector: str = "",
    share_images: bool = False,
    made_by: dict[str, str] | None = None,
    told_to_stop: Callable[[], bool] = lambda: False,
) -> float:
    """Score a test set after a stage, write its predictions, and return its score in percent.

    `selected` [N, m] and `scores` [N, T] (similarities) belong to the samples of `test`. Answers that an evaluation
    in the `earlier` folders got with the same sets are taken from there (design.md decision 8). `lmm` is called only
    if something has to be generated. `projector` is the fingerprint of a trained image projector, an answer's third
    ingredient, "" where it is the base model's. `share_images` computes an image once for all questions about it that
    get the same sets; the insertion after_image does so anyway. `made_by` are fingerprints of the base model and of
    what else its checkpoint says, under names of their own. `told_to_stop` is asked before every batch, by all ranks
    together, and has to tell all of them the same: then the answers that are there are kept for the next attempt, and
    Interrupted is raised.
    """
    path = folder / f"{test.name}.jsonl"
    prints = {name: pool.fingerprint(index) for index, name in enumerate(pool.names)}
    chosen = [[pool.names[number] for number in row if number != NO_SET] for row in selected.tolist()]
    wanted = [(projector, *(prints[name] for name in row)) for row in chosen]
    made_with = {"data": test.data.fingerprint, "max_new_tokens": test.max_new_tokens, "insertion": insertion}
    made_with |= made_by or {}

    def look() -> tuple[dict[int, str], list[int]]:
        known = known_answers(test.name, [folder, *earlier], made_with)
        wants = [(identity, wanted[index]) for index, identity in enumerate(test.data.ids)]
        found = {index: known[want] for index, want in enumerate(wants) if want in known}
        return found, [index for index in range(len(wants)) if index not in found]

    # By rank 0 alone: another rank may see other files, and would wait for answers that nobody else generates.
    answers, missing = on_main(world, look)
    if missing:
        model = lmm()
        examples = Examples(test.data, model.conversation, _sharing(model, insertion, share_images))
        share = _share_of(missing, examples, world)
        rounds = _Rounds(max(gather_objects(-(-len(share) // batch))), told_to_stop)
        mine = generate_answers(
            model, examples, share, selected, pool.prompts, test.max_new_tokens, batch, insertion,
            f"answering {test.name}" if world.main else None, rounds.go_on,
        )  # fmt: skip
        rounds.finish()
        for part in gather_objects(mine):
            answers.update(part)
        if rounds.stopped:
            on_main(world, lambda: keep_answers(folder, test, answers, wanted, made_with))
            raise Interrupted(
                f"Stopped by a signal while {test.name} was evaluated, with {len(answers)} of {len(wanted)} answers, "
                "which are kept. Run the same command again to go on."
            )

    def write() -> float:
        lines, scored = scored_lines(test, answers, chosen, scores)
        write_json(folder / SETS_FILE, {**prints, PROJECTOR: projector} if projector else prints)
        with replacing(path) as temporary:
            temporary.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")
        summary = {"metric": test.metric, "scoring": test.scoring, "samples": len(lines), "score": scored.percent}
        write_json(folder / f"{test.name}.score.json", {**summary, "parts": scored.parts, "made_with": made_with})
        (folder / UNFINISHED_FILE.format(test.name)).unlink(missing_ok=True)
        return scored.percent

    return on_main(world, write)


class _Rounds:
    """One batch of every rank is a round, between which all may stop; one without batches takes part all the same."""

    def __init__(self, rounds: int, told_to_stop: Callable[[], bool]) -> None:
        self.left, self.stopped, self._told = rounds, False, told_to_stop

    def go_on(self) -> bool:
        self.left -= 1
        self.stopped = self.stopped or self._told()
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
