"""Computing the accuracy matrix of a finished run: this project's evaluation against one sample after the other."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.nn.functional import cosine_similarity

from pipeline.backbones.key_encoders import key_encoder
from pipeline.backbones.lmm import LMM, load_lmm
from pipeline.bench import measure
from pipeline.config.load import load_run
from pipeline.config.recipe import Recipe
from pipeline.data.collate import Examples, collate_prompts
from pipeline.data.shards import IndexedShards
from pipeline.data.stage_data import StageData
from pipeline.errors import UserError
from pipeline.methods import make_method
from pipeline.prompts.generation import generate_once, prompt_sets
from pipeline.prompts.heads import ProjectionHead
from pipeline.prompts.parts.base import entry_of
from pipeline.prompts.pool import PromptPool
from pipeline.prompts.stage_files import add_stage, load_stage
from pipeline.ranks.world import World, init_world
from pipeline.sequence.answers import SETS_FILE, AnswerKey, AnswerStore, Routed
from pipeline.sequence.evaluate import Answering, evaluate_task
from pipeline.sequence.test_set import TestSet

REFERENCE = "reference"


@dataclass
class _Cost:
    """Cost of one variant so far, the share for routing keys, and its answers by cell."""

    seconds: float = 0.0
    operations: int = 0
    key_seconds: float = 0.0
    key_operations: int = 0
    answers: dict[tuple[int, int], list[str]] = field(default_factory=dict)


class _Matrix:
    """A finished run's pools and test sets, its model and its CLIP, loaded once."""

    def __init__(self, run: Path, limit: int) -> None:
        self.recipe: Recipe = load_run(run)
        self.method = make_method(self.recipe.method)
        if len(self.method.stages([task.name for task in self.recipe.data.tasks])) != len(self.recipe.data.tasks):
            raise UserError(f"'{run}' was not trained task by task; expected a run with one stage for each task.")
        if entry_of(self.method).insertion is None:
            raise UserError(f"'{run}' has learned no prompt sets; the reference knows nothing else.")
        self.pools: list[PromptPool] = []
        pool = PromptPool()
        for index, task in enumerate(self.recipe.data.tasks):
            stage = load_stage(run, index, task.name)
            if stage is None:
                raise UserError(f"'{run}' has no finished stage {task.name}; expected a run that is done.")
            add_stage(pool, task.name, stage.tensors)
            self.pools.append(pool.picked(range(index + 1)))
        self.tests = []
        for task in self.recipe.data.tasks:
            shards = IndexedShards(self.recipe.data.split_path(task.name, "test"))
            data = StageData([(shards, shards.keys(), limit)])
            self.tests.append(TestSet(task.name, task.metric, task.max_new_tokens, data, self.recipe.data.scoring))
        self.lmm: LMM = load_lmm(self.recipe.model)
        self.encoder = key_encoder(*self.recipe.keys.source)
        # As wide as the keys: a method without a learned router leaves no prototypes to take it from.
        width, keys = self.lmm.width, self.tests[0].data.keys.text.shape[1]
        self.heads = [ProjectionHead(width, keys) for _ in self.pools]

    @property
    def cells(self) -> list[tuple[int, int]]:
        """(stage, task) in the order in which a sequence computes them."""
        return [(stage, task) for stage in range(len(self.pools)) for task in range(stage + 1)]

    def keys(self) -> None:
        """Both keys of every test sample, in batches of keys.batch."""
        for test in self.tests:
            for start in range(0, len(test.data), self.recipe.keys.batch):
                end = min(start + self.recipe.keys.batch, len(test.data))
                samples = [test.data[index] for index in range(start, end)]
                self.encoder.text([sample.question for sample in samples])
                pictures = [picture for sample in samples if (picture := sample.picture()) is not None]
                if pictures:
                    self.encoder.image(pictures)

    def routed(self, stage: int, task: int) -> Routed:
        """The modules of a task's samples after a stage."""
        keys, routing = self.tests[task].data.keys, self.method.routing
        scores = routing.scores(keys, self.pools[stage].states)
        return Routed(routing.inference(scores, task, keys.has_image), routing.shown(scores))


def bench_evaluate(run: Path, limit: int = 20) -> dict[str, Any]:
    """Compute the matrix of a finished run with `limit` samples per task, each cell by every variant in turn.

    Variants:

    - reference: as the official scripts (docs/design.md 4.3): sample by sample, with CLIP's text tower and all
      prototypes computed each time and no answer reused; its image key is a by-product of the model's vision tower.
    - batched: this project without reuse of answers.
    - ours: this project.
    - shared: with evaluate.share_images.

    The last three include one pass of both CLIP towers over every test sample, as data_prep computes the keys.
    Operations are counted in a separate pass, because the counter takes more time than a small model. Raises UserError
    for a run that is not finished.
    """
    matrix, world = _Matrix(run, limit), init_world()
    costs: dict[str, _Cost] = {}
    with TemporaryDirectory() as folder:

        def ours(name: str, reuse: bool, share: bool) -> Callable[[str, int, int], list[str]]:
            return lambda kind, stage, task: _pipeline(
                matrix, world, Path(folder) / kind / name, stage, task, reuse, share
            )

        variants: dict[str, Callable[[str, int, int], list[str]]] = {
            REFERENCE: lambda _, stage, task: _one_by_one(matrix, stage, task),
            "batched": ours("batched", reuse=False, share=False),
            "ours": ours("ours", reuse=True, share=False),
            "shared": ours("shared", reuse=True, share=True),
        }
        costs = {name: _Cost() for name in variants}
        variants[REFERENCE]("timed", 0, 0)  # warms up
        for cell in matrix.cells:
            for name, call in variants.items():
                _time(costs[name], partial(call, "timed"), cell)
            so_far = ", ".join(f"{name} {cost.seconds:.1f} s" for name, cost in costs.items())
            measure.tell(f"cell {len(costs[REFERENCE].answers)} of {len(matrix.cells)}: {so_far}")
        for name, call in variants.items():
            measure.tell(f"operations of {name}")
            costs[name].operations = measure.operations(partial(_all_cells, matrix, call))[0]
    _add_keys(matrix, [cost for name, cost in costs.items() if name != REFERENCE])
    reference = costs[REFERENCE]
    return {
        "run": run.name,
        "cells": len(matrix.cells),
        "answers": sum(map(len, reference.answers.values())),
        "machine": measure.machine(),
        "variants": {
            name: {
                "seconds": round(cost.seconds, 2),
                "keys_s": round(cost.key_seconds, 2),
                "gflop": round(cost.operations / 1e9, 6),
                "keys_gflop": round(cost.key_operations / 1e9, 6),
                "same_answers": round(_agreement(reference, cost), 4),
            }
            for name, cost in costs.items()
        },
        "ratios": {
            REFERENCE: {
                name: {
                    "wall_clock": round(reference.seconds / cost.seconds, 2),
                    "operations": round(reference.operations / max(cost.operations, 1), 2),
                }
                for name, cost in costs.items()
                if name != REFERENCE
            }
        },
    }


def _time(cost: _Cost, call: Callable[[int, int], list[str]], cell: tuple[int, int]) -> None:
    """Compute a cell; record its answers and its time."""
    found: list[list[str]] = []
    cost.seconds += measure.seconds(lambda: found.append(call(*cell)))
    cost.answers[cell] = found[0]


def _all_cells(matrix: _Matrix, call: Callable[[str, int, int], list[str]]) -> None:
    for cell in matrix.cells:
        call("counted", *cell)


def _add_keys(matrix: _Matrix, costs: list[_Cost]) -> None:
    """Add the cost of data_prep to the variants: decode every test sample once and run CLIP's towers, in batches."""
    seconds, operations = measure.seconds(matrix.keys), measure.operations(matrix.keys)[0]
    for cost in costs:
        cost.seconds, cost.key_seconds = cost.seconds + seconds, seconds
        cost.operations, cost.key_operations = cost.operations + operations, operations


def _pipeline(
    matrix: _Matrix, world: World, folder: Path, stage: int, task: int, reuse: bool, share: bool
) -> list[str]:
    """One cell by `evaluate_task`, with reuse of the answers of earlier cells where the variant allows it."""
    here = folder / str(stage)
    earlier = [folder / str(before) for before in range(stage)] if reuse else []
    routed, test, settings = matrix.routed(stage, task), matrix.tests[task], matrix.recipe
    store = AnswerStore(here, earlier, AnswerKey(matrix.method.insertion))
    answering = Answering(lambda: matrix.lmm, settings.evaluate.batch, entry_of(matrix.method), share)
    evaluate_task(test, matrix.pools[stage], lambda: routed, store, answering, world)
    assert (here / SETS_FILE).is_file()
    return [json.loads(line)["prediction"] for line in (here / f"{test.name}.jsonl").read_text("utf-8").splitlines()]


@torch.no_grad()
def _one_by_one(matrix: _Matrix, stage: int, task: int) -> list[str]:
    """One cell as the official scripts compute it."""
    test, pool, lmm = matrix.tests[task], matrix.pools[stage], matrix.lmm
    examples = Examples(test.data, lmm.conversation)
    selection = matrix.routed(stage, task).selection
    answers = []
    for index in range(len(test.data)):
        keys = [matrix.encoder.text([test.data[index].question]), test.data.keys.image[torch.tensor([index])].float()]
        for number, prompt in enumerate(pool.prompts):  # prototypes and similarities, recomputed for every sample
            prototype = matrix.heads[number](prompt)
            for key in keys:
                cosine_similarity(key, prototype[None], dim=-1)
        inputs = collate_prompts(examples, [index], selection)
        sets = prompt_sets(pool.prompts.to(lmm.dtype), inputs.selection, matrix.method.insertion)
        tokens = generate_once(lmm, inputs, sets, test.max_new_tokens)
        answers.append(lmm.conversation.decode(tokens[0]))
    return answers


def _agreement(one: _Cost, other: _Cost) -> float:
    pairs = [pair for cell, answers in one.answers.items() for pair in zip(answers, other.answers[cell], strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)
