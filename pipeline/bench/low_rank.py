"""Costs of low-rank modules: one, those of eight tasks with weights by sample, and eight of a thousand tasks'."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.backbones.lmm import LMM
from pipeline.bench import measure
from pipeline.bench.sizes import SIZES, every_image, make_batch, make_lmm
from pipeline.bench.step import LearnerStep
from pipeline.data.collate import Batch
from pipeline.data.selection import Selection
from pipeline.prompts.generation import Modules, generate_once
from pipeline.prompts.learner import Learner
from pipeline.prompts.parts.low_rank import LowRank, LowRankEntry

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
RANK, ALPHA = 8, 16.0
TOGETHER = 8  # modules of one sample
NEW_TOKENS = 12  # of an answer


class LowRankStep(LearnerStep):
    """Steps on one module beside earlier ones."""

    def __init__(self, lmm: LMM, bank: dict[str, Tensor]) -> None:
        learner = Learner({"module": LowRank(lmm, TARGETS, RANK, ALPHA)})
        for value in learner.trainables().values():
            nn.init.normal_(value, std=0.02)
        super().__init__(lmm, learner, bank)


def bench_low_rank(
    size_name: str = "small",
    many: int = 1024,
    samples: int = 4,
    rounds: int = 5,
    device: str = "cpu",
    dtype: str = "float32",
) -> dict[str, Any]:
    """Measure training steps and answers with one module, with eight tasks', and with eight of `many` tasks' each.

    Every sample has weights of its own. In training the eighth module is the one that is trained; an answer gets eight
    finished ones. Of `many` tasks every sample draws its own, so up to 7 or 8 times `samples` modules are used at once.
    """
    size = SIZES[size_name]
    lmm = make_lmm(size, device, dtype)
    generator = torch.Generator().manual_seed(4)
    shapes = {name: value.shape for name, value in LowRank(lmm, TARGETS, RANK, ALPHA).trainables().items()}
    kind = {"device": lmm.model.device, "dtype": lmm.dtype}
    pool = {name: torch.empty(many, *shape, **kind).normal_(std=0.02) for name, shape in shapes.items()}
    frozen = [*lmm.parameters(), *lmm.buffers()]
    calls: dict[str, tuple[Any, int, Any]] = {}

    def batch_of(selection: Selection, answers: bool) -> Batch:
        batch = every_image(make_batch(size, samples, 1, answers=answers))
        return replace(batch, selected=selection.numbers, selected_weights=selection.weights).to(lmm.model.device)

    def mixed(tasks: int, chosen: int) -> Selection:
        """For every sample so many of these tasks, with weights that add up to 1."""
        numbers = torch.stack([torch.randperm(tasks, generator=generator)[:chosen] for _ in range(samples)])
        return Selection(numbers, torch.softmax(torch.randn(samples, chosen, generator=generator), dim=1))

    for tasks in (1, TOGETHER, many):
        label = "one module" if tasks == 1 else f"{TOGETHER} of {tasks} tasks"
        # A copy of a small pool: a view would be counted as the whole one that it is of.
        bank = {
            name: value[: tasks - 1] if tasks == many else value[: tasks - 1].clone() for name, value in pool.items()
        }
        step = LowRankStep(lmm, bank if tasks > 1 else {})
        beside = mixed(tasks - 1, min(tasks, TOGETHER) - 1) if tasks > 1 else Selection.none(samples)
        calls[f"step, {label}"] = partial(step, batch_of(beside, True)), samples, partial(_held, step, frozen)
        selection = mixed(tasks, min(tasks, TOGETHER))
        used = selection.numbers.unique()
        places = torch.searchsorted(used, selection.numbers)
        modules = {name: value[used.to(value.device)] for name, value in pool.items()}
        given = Modules(modules, selection.renumbered(places), LowRankEntry(ALPHA / RANK))
        asked = batch_of(selection.renumbered(places), False)
        answer = partial(_answer, lmm, asked, given)
        calls[f"answer, {label}"] = answer, samples, partial(_held, None, frozen)
    measured = measure.compare(calls, rounds, device)

    def ratio(kind: str, slow: str, fast: str) -> dict[str, float]:
        return measure.ratio(measured[f"{kind}, {slow}"], measured[f"{kind}, {fast}"])

    one, eight, thousand = "one module", f"{TOGETHER} of {TOGETHER} tasks", f"{TOGETHER} of {many} tasks"
    return {
        "size": size_name,
        "dtype": dtype,
        "samples": samples,
        "rank": RANK,
        "rounds": rounds,
        "machine": measure.machine(device),
        "variants": {name: value.to_json(None) for name, value in measured.items()},
        "ratios": {
            one: {kind: ratio(kind, eight, one) for kind in ("step", "answer")},
            f"{TOGETHER} tasks": {kind: ratio(kind, thousand, eight) for kind in ("step", "answer")},
        },
    }


def _held(step: LowRankStep | None, frozen: list[Tensor]) -> dict[str, Any]:
    return {"frozen": frozen, **(step.held if step is not None else {})}


@torch.no_grad()
def _answer(lmm: LMM, batch: Batch, modules: Modules) -> list[list[int]]:
    return generate_once(lmm, batch, modules, NEW_TOKENS)
