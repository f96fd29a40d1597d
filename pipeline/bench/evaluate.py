"""The whole accuracy matrix of a finished run: as the pipeline fills it in, against one sample after the other."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from pipeline.backbones.clip import KeyEncoder
from pipeline.backbones.lmm import LMM, load_lmm
from pipeline.bench import measure
from pipeline.checkpoint import load_stage
from pipeline.config import Recipe, load_run
from pipeline.data.collate import Examples, StageData, collate_prompts
from pipeline.data.shards import IndexedShards
from pipeline.distributed import World, init_world
from pipeline.errors import UserError
from pipeline.evaluate import SETS_FILE, Test, evaluate_task, generate_once, task_similarity
from pipeline.methods import make_method
from pipeline.prompts.heads import ProjectionHead
from pipeline.prompts.pool import PromptPool


@dataclass
class _Cost:
    """What one variant has taken so far, and what it answered, by cell."""

    seconds: float = 0.0
    operations: int = 0
    answers: dict[tuple[int, int], list[str]] = field(default_factory=dict)


class _Matrix:
    """A finished run's pools and test sets, the model and its CLIP, all loaded once."""

    def __init__(self, run: Path, limit: int) -> None:
        self.recipe: Recipe = load_run(run)
        self.method = make_method(self.recipe.method)
        if len(self.method.stages([task.name for task in self.recipe.data.tasks])) != len(self.recipe.data.tasks):
            raise UserError(f"'{run}' was not trained task by task; expected a run with one stage for each task.")
        self.pools: list[PromptPool] = []
        pool = PromptPool()
        for index, task in enumerate(self.recipe.data.tasks):
            stage = load_stage(run, index, task.name)
            if stage is None:
                raise UserError(f"'{run}' has no finished stage {task.name}; expected a run that is done.")
            pool.append(task.name, stage.prompt, stage.prototype)
            self.pools.append(PromptPool(list(pool.names), pool.prompts.clone(), pool.prototypes.clone()))
        self.tests = []
        for task in self.recipe.data.tasks:
            shards = IndexedShards(self.recipe.data.split_path(task.name, "test"))
            data = StageData([(shards, shards.keys(), limit)])
            self.tests.append(Test(task.name, task.metric, task.max_new_tokens, data, self.recipe.data.scoring))
        self.lmm: LMM = load_lmm(self.recipe.model)
        self.encoder = KeyEncoder(*self.recipe.keys.source)
        width, keys = self.lmm.width, self.pools[-1].prototypes.shape[1]
        self.heads = [ProjectionHead(width, keys) for _ in self.pools]

    @property
    def cells(self) -> list[tuple[int, int]]:
        """(stage, task), in the order in which a sequence fills them in."""
        return [(stage, task) for stage in range(len(self.pools)) for task in range(stage + 1)]

    def routed(self, stage: int, task: int) -> tuple[Tensor, Tensor]:
        """Similarities [N, T] and sets [N, m] of a task's samples after a stage."""
        test, pool = self.tests[task], self.pools[stage]
        scores = task_similarity(test, pool, self.recipe.method.image_weight)
        return scores, self.method.answering_sets(pool, task, scores, test.data.keys.has_image)


def bench_evaluate(run: Path, limit: int = 20) -> dict[str, Any]:
    """Fill in the matrix of a finished run with `limit` samples per task, each cell once by every variant in turn.

    reference: as the official scripts do (modalprompt.md 5), sample by sample with CLIP's towers and all prototypes
    computed each time, every cell anew. batched: the pipeline without reuse. ours: the pipeline. shared: with
    evaluate.share_images. Raises UserError for a run that is not finished.
    """
    matrix, world = _Matrix(run, limit), init_world()
    costs: dict[str, _Cost] = {}
    with TemporaryDirectory() as folder:

        def ours(name: str, reuse: bool, share: bool) -> Callable[[int, int], list[str]]:
            return lambda stage, task: _pipeline(matrix, world, Path(folder) / name, stage, task, reuse, share)

        variants: dict[str, Callable[[int, int], list[str]]] = {
            "reference": lambda stage, task: _one_by_one(matrix, stage, task),
            "batched": ours("batched", reuse=False, share=False),
            "ours": ours("ours", reuse=True, share=False),
            "shared": ours("shared", reuse=True, share=True),
        }
        variants["reference"](0, 0)  # warms up
        for cell in matrix.cells:
            for name, call in variants.items():
                _fill_in(costs.setdefault(name, _Cost()), call, cell)
            so_far = ", ".join(f"{name} {cost.seconds:.1f} s" for name, cost in costs.items())
            measure.tell(f"cell {len(costs['reference'].answers)} of {len(matrix.cells)}: {so_far}")
    answered = sum(map(len, costs["reference"].answers.values()))
    reference = costs["reference"]
    return {
        "run": run.name,
        "cells": len(matrix.cells),
        "answers": answered,
        "machine": measure.machine(),
        "variants": {
            name: {"seconds": round(cost.seconds, 2), "gflop": round(cost.operations / 1e9, 2),
                   "same_answers": round(_agreement(reference, cost), 4)}
            for name, cost in costs.items()
        },
        "ratios": {"reference": {
            name: {"wall_clock": round(reference.seconds / cost.seconds, 2),
                   "operations": round(reference.operations / max(cost.operations, 1), 2)}
            for name, cost in costs.items() if name != "reference"
        }},
    }  # fmt: skip


def _fill_in(cost: _Cost, call: Callable[[int, int], list[str]], cell: tuple[int, int]) -> None:
    """Time a cell; operations are counted in the same call, which slows all variants alike per operation."""
    found: list[list[str]] = []

    def work() -> None:
        found.append(call(*cell))

    def counted() -> None:
        cost.operations += measure.operations(work)[0]

    cost.seconds += measure.seconds(counted)
    cost.answers[cell] = found[0]


def _pipeline(
    matrix: _Matrix, world: World, folder: Path, stage: int, task: int, reuse: bool, share: bool
) -> list[str]:
    """One cell by `evaluate_task`, with the answers of the cells before where they may be used."""
    here = folder / str(stage)
    earlier = [folder / str(before) for before in range(stage)] if reuse else []
    scores, selected = matrix.routed(stage, task)
    test, settings = matrix.tests[task], matrix.recipe
    evaluate_task(
        lambda: matrix.lmm, test, matrix.pools[stage], selected, scores, world, here, settings.evaluate.batch, earlier,
        settings.method.insertion, share_images=share,
    )  # fmt: skip
    assert (here / SETS_FILE).is_file()
    return [json.loads(line)["prediction"] for line in (here / f"{test.name}.jsonl").read_text("utf-8").splitlines()]


@torch.no_grad()
def _one_by_one(matrix: _Matrix, stage: int, task: int) -> list[str]:
    """One cell as the official scripts fill it in."""
    test, pool, lmm = matrix.tests[task], matrix.pools[stage], matrix.lmm
    examples = Examples(test.data, lmm.conversation)
    _, selected = matrix.routed(stage, task)
    answers = []
    for index in range(len(test.data)):
        sample = test.data[index]
        picture = sample.picture()
        keys = [matrix.encoder.text([sample.question])] + ([] if picture is None else [matrix.encoder.image([picture])])
        for number, prompt in enumerate(pool.prompts):  # prototypes and similarities, anew for every sample
            prototype = matrix.heads[number](prompt)
            for key in keys:
                cosine_similarity(key, prototype[None], dim=-1)
        inputs = collate_prompts(examples, [index], selected)
        tokens = generate_once(
            lmm, inputs, pool.prompts.to(lmm.dtype), test.max_new_tokens, matrix.recipe.method.insertion
        )
        answers.append(lmm.conversation.decode(tokens[0]))
    return answers


def _agreement(one: _Cost, other: _Cost) -> float:
    pairs = [pair for cell, answers in one.answers.items() for pair in zip(answers, other.answers[cell], strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)
