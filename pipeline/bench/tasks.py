"""Costs of many tasks against few: a training step, an answer, memory, and the selection of a stage."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from pipeline.backbones.lmm import LMM
from pipeline.bench import measure
from pipeline.bench.sizes import SIZES, Size, every_image, make_batch, make_lmm
from pipeline.bench.step import OurStep
from pipeline.config.method import method_options
from pipeline.data.collate import Batch
from pipeline.data.keys import Keys
from pipeline.methods import make_method
from pipeline.prompts.generation import generate_once, prompt_sets
from pipeline.prompts.pool import PromptPool
from pipeline.prompts.routers.mean import similarity
from pipeline.prompts.rules.top_k import select_for_inference

NEW_TOKENS = 12  # of an answer
STAGE_SAMPLES = 2_000  # samples of a stage, whose selection is timed


def bench_tasks(
    size_name: str = "small",
    few: int = 8,
    many: int = 1024,
    samples: int = 2,
    rounds: int = 5,
    insertion: str = "after_bos",
    device: str = "cpu",
    dtype: str = "float32",
) -> dict[str, Any]:
    """Measure training steps and answers with `few` and with `many` tasks in the pool; ratios are many / few.

    Training holds the pool in memory, which is counted. For answers the pool's file is memory-mapped, as an exported
    adapter's: the batch's sets and all prototypes are read, and only the prototypes are counted.
    """
    size = SIZES[size_name]
    lmm = make_lmm(size, device, dtype)
    pools = {tasks: _pool(size, tasks) for tasks in (few, many)}
    frozen = [*lmm.parameters(), *lmm.buffers()]
    calls: dict[str, tuple[Any, int, Callable[[], dict[str, Any]]]] = {}
    adapter_bytes: dict[str, int] = {}
    for tasks, pool in pools.items():
        mapped, adapter_bytes[str(tasks)] = _from_file(pool)
        held = partial(_held, [*frozen, pool.prompts, pool.prototypes])
        batch = every_image(make_batch(size, samples, 1, tasks - 1)).to(torch.device(device))
        step = OurStep(lmm, size, pool.prompts[:-1], pool.prompts[-1], insertion)
        calls[f"step, {tasks} tasks"] = partial(step, batch), samples, partial(held, step)
        asked = every_image(make_batch(size, samples, 1, answers=False)).to(torch.device(device))
        answer = partial(_answer, lmm, mapped, asked, size, insertion)
        calls[f"answer, {tasks} tasks"] = answer, samples, partial(_held, [*frozen, pool.prototypes])
    measured = measure.compare(calls, rounds, device)
    ratios = {
        kind: measure.ratio(measured[f"{kind}, {many} tasks"], measured[f"{kind}, {few} tasks"])
        for kind in ("step", "answer")
    }
    return {
        "size": size_name,
        "insertion": insertion,
        "samples": samples,
        "machine": measure.machine(device),
        "variants": {name: value.to_json(None) for name, value in measured.items()},
        "ratios": {f"{few} tasks": ratios},
        "stage_selection_s_per_1000_samples": {
            str(tasks): round(_selection_seconds(size, pool) * 1000 / STAGE_SAMPLES, 4) for tasks, pool in pools.items()
        },
        "adapter_bytes": adapter_bytes,
    }


def _held(frozen: list[Tensor], step: OurStep | None = None) -> dict[str, Any]:
    return {"frozen": frozen, **(step.held if step is not None else {})}


def _pool(size: Size, tasks: int) -> PromptPool:
    generator = torch.Generator().manual_seed(2)
    return PromptPool.of_prompts(
        [str(task) for task in range(tasks)],
        torch.randn(tasks, size.prompt_length, size.width, generator=generator) * 0.02,
        torch.randn(tasks, size.key_width, generator=generator),
    )


def _from_file(pool: PromptPool) -> tuple[PromptPool, int]:
    """The memory-mapped pool, and the size of its file in bytes."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "pool.safetensors"
        pool.save(path)
        return PromptPool.load(path), path.stat().st_size  # the mapping outlives the file's name


@torch.no_grad()
def _answer(lmm: LMM, pool: PromptPool, batch: Batch, size: Size, insertion: str) -> list[list[int]]:
    """Route questions with given keys and answer them, as `predict` does after CLIP."""
    scores = similarity(batch.image_key.cpu(), batch.text_key.cpu(), pool.prototypes, has_image=batch.has_image.cpu())
    selected = select_for_inference(scores, size.k)
    used, numbers = selected.unique(return_inverse=True)
    batch.selected = numbers.reshape(selected.shape).to(batch.input_ids.device)
    bank = pool.prompts[used].to(batch.input_ids.device, lmm.dtype)
    return generate_once(lmm, batch, prompt_sets(bank, batch.selection, insertion), NEW_TOKENS)


def _selection_seconds(size: Size, pool: PromptPool) -> float:
    generator = torch.Generator().manual_seed(3)
    keys: list[Tensor] = [torch.randn(STAGE_SAMPLES, size.key_width, generator=generator) for _ in range(2)]
    method = make_method(method_options(k=size.k))
    data = Keys(keys[0], keys[1], torch.ones(STAGE_SAMPLES, dtype=torch.bool), {})
    return min(measure.seconds(lambda: method.routing.training(data, pool.states)) for _ in range(3))
