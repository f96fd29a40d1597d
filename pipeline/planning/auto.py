"""Resolve a recipe's `auto` settings, DeepSpeed file and activation checkpointing, from the memory plan."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import nn

from pipeline.config.train import AUTO, HPZ, ZERO2, ZERO3, TrainConfig
from pipeline.data.sample import Sample
from pipeline.errors import UserError
from pipeline.planning.memory_plan import plan_memory
from pipeline.planning.model_files import ModelFiles
from pipeline.planning.model_shape import meta_model
from pipeline.planning.plan import GIB, MemoryPlan, Tokens
from pipeline.planning.workload import Workload
from pipeline.ranks.environment import ranks_per_node
from pipeline.ranks.world import World, on_main
from pipeline.training.hpz import several_nodes

log = logging.getLogger(__name__)
POLICIES = ("none", "selective", "full")  # in ascending order of recomputation
# Memory left to CUDA itself, and the share of the rest that may be planned: a margin for the errors of the plan's
# estimates and for fragmentation.
KEPT_FREE, ESTIMATED = 1 * GIB, 0.92


def resolve_auto(
    work: Workload, cuts: bool, world: World, samples: Callable[[], list[Sample]] = list, node: int | None = None
) -> TrainConfig:
    """The training settings with `auto` resolved, the same on all ranks; a collective.

    Args:
        work: what is trained and generated; its settings are returned as they are where nothing is `auto`.
        cuts: whether questions that are too long are cut, see `DataConfig.cuts`.
        world: the ranks. Without GPUs nothing is planned, see `without_gpus`.
        samples: returns training samples, of which the longest is planned for; called on rank 0.
        node: number of ranks on each node, 1 where nodes differ.

    Raises UserError on all ranks where rank 0 cannot plan.
    """
    if AUTO not in (work.train.deepspeed, work.train.checkpointing):
        return work.train
    if world.device.type == "cpu":
        return without_gpus(work.train)

    def plan() -> tuple[str, str]:
        memory = gpu_memory(world.device)
        tokens = ModelFiles(work.model, online=False, cuts=cuts).tokens(samples())
        chosen = fit_to_memory(work, world.size, meta_model(work.model), tokens, memory, node)
        told = "train.deepspeed: %s, train.checkpointing: %s (%s)"
        log.info(told, chosen.deepspeed, chosen.checkpointing, tokens.source)
        return chosen.deepspeed, chosen.checkpointing

    # All ranks need the same settings: ZeRO-3 gathers layers by collectives in the order of execution.
    return _with(work.train, *on_main(world, plan))


def fit_to_memory(
    work: Workload, ranks: int, model: nn.Module, tokens: Tokens, memory: int, node: int | None = None
) -> TrainConfig:
    """The training settings with `auto` replaced by the fastest that fit into `memory` bytes per GPU by the plan.

    ZeRO-2 is preferred, which communicates no frozen weights, with the least recomputation that fits; then ZeRO-3, on
    several nodes with a second copy of the weights per node where that fits (hpZ), so that weights are gathered within
    nodes only. Where nothing fits, the settings that need least. `model` is on the meta device, `node` the number of
    ranks on each node (None: as on this machine); see `plan_memory`.
    """
    chosen, plan = fastest(work, ranks, model, tokens, memory, node)
    if not fits(plan.evaluation, memory):
        # No setting chosen here changes this: replicas need the complete model on each GPU under every ZeRO stage.
        divided = divided_plan(work.trained_with(chosen), ranks, model, tokens, node)
        log.warning(
            "Generating %d answers at once takes %.1f GiB by the memory plan, more than the %.1f GiB that are "
            "available; lower evaluate.batch%s.",
            work.answers,
            plan.evaluation / GIB,
            allowed(memory) / GIB,
            "" if divided is None else f", or set evaluate.engine=sharded ({divided.evaluation / GIB:.1f} GiB)",
        )
    return chosen


def fastest(
    work: Workload, ranks: int, model: nn.Module, tokens: Tokens, memory: int, node: int | None = None
) -> tuple[TrainConfig, MemoryPlan]:
    """The settings that `fit_to_memory` chooses, with their plan; nothing is logged."""
    train = work.train
    spread = (HPZ, ZERO3) if several_nodes(ranks, node or ranks_per_node()) else (ZERO3,)
    files = (ZERO2, *spread) if train.deepspeed == AUTO else (train.deepspeed,)
    policies = POLICIES if train.checkpointing == AUTO else (train.checkpointing,)
    for candidate in (_with(train, file, policy) for file in files for policy in policies):
        plan = plan_memory(work.trained_with(candidate), ranks, model, tokens, node)
        if fits(plan.training, memory):
            break
    return candidate, plan


def divided_plan(
    work: Workload, ranks: int, model: nn.Module, tokens: Tokens, node: int | None = None
) -> MemoryPlan | None:
    """The memory plan with `evaluate.engine: sharded`; None where that is set, not possible or no smaller."""
    if work.evaluate.engine == "sharded":
        return None
    try:
        plan = plan_memory(work.evaluated_by("sharded"), ranks, model, tokens, node)
    except UserError:
        return None
    return plan if plan.evaluation < plan_memory(work, ranks, model, tokens, node).evaluation else None


def fits(planned: int, memory: int) -> bool:
    """Whether so many planned bytes fit into `memory` bytes of a GPU."""
    return planned <= allowed(memory)


def allowed(memory: int) -> float:
    """The bytes that may be planned of a GPU with `memory` bytes."""
    return (memory - KEPT_FREE) * ESTIMATED


def gpu_memory(device: torch.device) -> int:
    """Bytes of a GPU's memory."""
    return torch.cuda.get_device_properties(device).total_memory


def without_gpus(train: TrainConfig) -> TrainConfig:
    """The training settings with `auto` replaced by the values for CPUs, not planned: ZeRO-3, no recomputation."""
    return _with(
        train,
        ZERO3 if train.deepspeed == AUTO else train.deepspeed,
        POLICIES[0] if train.checkpointing == AUTO else train.checkpointing,
    )


def least_for_zero2(work: Workload, ranks: int, model: nn.Module, tokens: Tokens) -> int:
    """Bytes of GPU memory from which `train.deepspeed: auto` is resolved to ZeRO-2."""
    policy = POLICIES[-1] if work.train.checkpointing == AUTO else work.train.checkpointing
    plan = plan_memory(work.trained_with(_with(work.train, ZERO2, policy)), ranks, model, tokens)
    return int(plan.training / ESTIMATED) + KEPT_FREE


def _with(train: TrainConfig, file: str, policy: str) -> TrainConfig:
    return train.model_copy(update={"deepspeed": file, "checkpointing": policy})
