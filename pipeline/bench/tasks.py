"""Costs of many tasks against few: a training step, an answer, memory, the router, and the selection of a stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pipeline.backbones.lmm import LMM
from pipeline.bench import measure
from pipeline.bench.sizes import SIZES, Size, every_image, make_batch, make_lmm
from pipeline.bench.step import OurStep
from pipeline.config.method import choice_name, method_options
from pipeline.data.collate import Batch
from pipeline.data.keys import Keys
from pipeline.methods import make_method
from pipeline.prompts.generation import generate_once, prompt_sets
from pipeline.prompts.parts.input_rows import PROMPT
from pipeline.prompts.pool import PromptPool
from pipeline.prompts.routers import State, States
from pipeline.prompts.routers.kept_keys import KEPT, PER_TASK
from pipeline.prompts.routing import Routing

NEW_TOKENS = 12  # of an answer
STAGE_SAMPLES = 2_000  # samples of a stage, whose selection is timed


@dataclass(frozen=True)
class SetsInUse:
    """How sets are chosen and where they stand.

    Args:
        insertion: where they stand.
        router: name of a router; None: the default recipe's.
        key_width: of the routing keys, such as CLIP-L's 768; None: the size's.
    """

    insertion: str = "after_bos"
    router: str | None = None
    key_width: int | None = None


def bench_tasks(
    size_name: str = "small",
    few: int = 8,
    many: int = 1024,
    samples: int = 2,
    rounds: int = 5,
    use: SetsInUse | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> dict[str, Any]:
    """Measure training steps and answers with `few` and with `many` tasks in the pool; ratios are many / few.

    Training holds the pool's sets in memory, which are counted, and so is what the router makes of all tasks. For
    answers the pool's file is memory-mapped, as an exported adapter's: the batch's sets and the kept keys of its tasks
    are read. The kept keys of all tasks are counted apart (`router`), for they are mapped wherever a file has them.

    Args:
        size_name: the shape of the model.
        few: tasks to compare with.
        many: tasks that must cost no more.
        samples: of a step, and questions of an answer.
        rounds: interleaved repeats.
        use: how sets are chosen and where they stand; None: as in the default recipe.
        device: cpu or cuda.
        dtype: of the model.
    """
    use = use or SetsInUse()
    size = replace(SIZES[size_name], key_width=use.key_width or SIZES[size_name].key_width)
    options = method_options(k=size.k, **({} if use.router is None else {"router": use.router}))
    routing = make_method(options).routing
    lmm = make_lmm(size, device, dtype)
    frozen = [*lmm.parameters(), *lmm.buffers()]
    calls: dict[str, tuple[Any, int, Callable[[], dict[str, Any]]]] = {}
    adapter_bytes: dict[str, int] = {}
    pools: dict[int, PromptPool] = {}
    routers: dict[str, dict[str, float]] = {}
    for tasks in (few, many):
        pool = _pool(size, tasks, routing)
        mapped, adapter_bytes[str(tasks)] = _from_file(pool)
        made, routers[str(tasks)] = _router(routing, mapped.states)
        # From here on the kept keys are those of the file.
        pools[tasks] = PromptPool(pool.names, pool.tensors, mapped.states)
        held = partial(_held, [*frozen, pool.prompts, made])
        batch = every_image(make_batch(size, samples, 1, tasks - 1)).to(torch.device(device))
        step = OurStep(lmm, size, pool.prompts[:-1], pool.prompts[-1], use.insertion)
        calls[f"step, {tasks} tasks"] = partial(step, batch), samples, partial(held, step)
        asked = every_image(make_batch(size, samples, 1, answers=False)).to(torch.device(device))
        answer = partial(_answer, lmm, mapped, asked, routing, use.insertion)
        calls[f"answer, {tasks} tasks"] = answer, samples, partial(_held, [*frozen, made])
    measured = measure.compare(calls, rounds, device)
    ratios = {
        kind: measure.ratio(measured[f"{kind}, {many} tasks"], measured[f"{kind}, {few} tasks"])
        for kind in ("step", "answer")
    }
    return {
        "size": size_name,
        "insertion": use.insertion,
        "samples": samples,
        "key_width": size.key_width,
        "router_name": choice_name(make_method(options).router or ""),
        "machine": measure.machine(device),
        "variants": {name: value.to_json(None) for name, value in measured.items()},
        "ratios": {f"{few} tasks": ratios},
        "router": routers,
        "stage_selection_s_per_1000_samples": {
            str(tasks): round(_selection_seconds(size, pool, routing) * 1000 / STAGE_SAMPLES, 4)
            for tasks, pool in pools.items()
        },
        "adapter_bytes": adapter_bytes,
    }


def _held(frozen: list[Any], step: OurStep | None = None) -> dict[str, Any]:
    return {"frozen": frozen, **(step.held if step is not None else {})}


def _pool(size: Size, tasks: int, routing: Routing) -> PromptPool:
    generator = torch.Generator().manual_seed(2)
    prompts = torch.randn(tasks, size.prompt_length, size.width, generator=generator) * 0.02
    states = [routing.observe(_keys(size, PER_TASK, generator)) for _ in range(tasks)]
    return PromptPool([str(task) for task in range(tasks)], {PROMPT: prompts}, States(states))


def _keys(size: Size, samples: int, generator: torch.Generator) -> Keys:
    """Keys of one task: around a centre of each kind."""
    kinds = []
    for _ in range(2):
        centre = torch.randn(size.key_width, generator=generator)
        kinds.append((centre + torch.randn(samples, size.key_width, generator=generator)).half())
    return Keys(kinds[0], kinds[1], torch.ones(samples, dtype=torch.bool), {})


def _router(routing: Routing, states: States) -> tuple[dict[str, Any], dict[str, float]]:
    """What is made of the states of all tasks, and its cost: seconds once, and MiB of it and of the states."""
    made: dict[str, Any] = {}
    spent = measure.seconds(lambda: made.update(routing.fitted(states)))
    kept, own = (_mib([_part_of(state, kept) for state in states]) for kept in (True, False))
    cost = {"fit_s": round(spent, 3), "made_mib": _mib(made), "kept_keys_mib": kept, "own_state_mib": own}
    return {"made": made, "own": [_part_of(state, False) for state in states]}, cost


def _part_of(state: State, kept: bool) -> list[Tensor]:
    return [value for name, value in state.items() if name.startswith(KEPT) == kept]


def _mib(value: Any) -> float:
    return round(sum(leaf.nbytes for leaf in tree_leaves(value) if isinstance(leaf, Tensor)) / measure.MIB, 4)


def _from_file(pool: PromptPool) -> tuple[PromptPool, int]:
    """The memory-mapped pool, and the size of its file in bytes."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "pool.safetensors"
        pool.save(path)
        return PromptPool.load(path), path.stat().st_size  # the mapping outlives the file's name


@torch.no_grad()
def _answer(lmm: LMM, pool: PromptPool, batch: Batch, routing: Routing, insertion: str) -> list[list[int]]:
    """Route questions with given keys and answer them, as `predict` does after CLIP."""
    keys = Keys(batch.image_key.cpu(), batch.text_key.cpu(), batch.has_image.cpu(), {})
    selected = routing.route(keys, pool.states, 0).selection.numbers
    used, numbers = selected.unique(return_inverse=True)
    batch.selected = numbers.reshape(selected.shape).to(batch.input_ids.device)
    bank = pool.prompts[used].to(batch.input_ids.device, lmm.dtype)
    return generate_once(lmm, batch, prompt_sets(bank, batch.selection, insertion), NEW_TOKENS)


def _selection_seconds(size: Size, pool: PromptPool, routing: Routing) -> float:
    """Of one stage's samples, with what the router makes of the earlier tasks and the stage's own, once per stage."""
    keys = _keys(size, STAGE_SAMPLES, torch.Generator().manual_seed(3))
    return measure.seconds(lambda: routing.training(keys, pool.states))
