"""Resolve a recipe's `auto` settings, DeepSpeed file and activation checkpointing, from the memory plan."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import nn

from pipeline.config.recipe import Recipe
from pipeline.data.sample import Sample
from pipeline.planning.memory_plan import plan_memory
from pipeline.planning.model_files import ModelFiles
from pipeline.planning.model_shape import meta_model
from pipeline.planning.plan import GIB, Tokens
from pipeline.ranks.environment import ranks_per_node
from pipeline.ranks.world import World, on_main
from pipeline.training.deepspeed_config import AUTO, HPZ, ZERO2, ZERO3
from pipeline.training.hpz import several_nodes

log = logging.getLogger(__name__)
POLICIES = ("none", "selective", "full")  # in ascending order of recomputation
# Memory left to CUDA itself, and the share of the rest that may be planned: a margin for the errors of the plan's
# estimates and for fragmentation.
KEPT_FREE, ESTIMATED = 1 * GIB, 0.92


def resolve_auto(
    recipe: Recipe, world: World, key_width: int, samples: Callable[[], list[Sample]] = list, node: int | None = None
) -> Recipe:
    """The recipe with its `auto` settings resolved, the same on all ranks; a collective.

    Args:
        recipe: the recipe; returned as it is where nothing is `auto`.
        world: the ranks. Without GPUs nothing is planned, see `without_gpus`.
        key_width: width of the CLIP keys.
        samples: returns training samples, of which the longest is planned for; called on rank 0.
        node: number of ranks on each node, 1 where nodes differ.

    Raises UserError on all ranks where rank 0 cannot plan.
    """
    if AUTO not in (recipe.train.deepspeed, recipe.train.checkpointing):
        return recipe
    if world.device.type == "cpu":
        return without_gpus(recipe)

    def plan() -> tuple[str, str]:
        memory = gpu_memory(world.device)
        tokens = ModelFiles(recipe.model, online=False, cuts=recipe.data.cuts).tokens(samples())
        chosen = fit_to_memory(recipe, world.size, key_width, meta_model(recipe.model), tokens, memory, node)
        told = "train.deepspeed: %s, train.checkpointing: %s (%s)"
        log.info(told, chosen.train.deepspeed, chosen.train.checkpointing, tokens.source)
        return chosen.train.deepspeed, chosen.train.checkpointing

    # All ranks need the same settings: ZeRO-3 gathers layers by collectives in the order of execution.
    return _with(recipe, *on_main(world, plan))


def fit_to_memory(
    recipe: Recipe, ranks: int, key_width: int, model: nn.Module, tokens: Tokens, memory: int, node: int | None = None
) -> Recipe:
    """The recipe with `auto` replaced by the fastest settings that fit into `memory` bytes per GPU by the memory plan.

    ZeRO-2 is preferred, which communicates no frozen weights, with the least recomputation that fits; then ZeRO-3, on
    several nodes with a second copy of the weights per node where that fits (hpZ), so that weights are gathered within
    nodes only. Where nothing fits, the settings that need least. `model` is on the meta device, `node` the number of
    ranks on each node (None: as on this machine); see `plan_memory`.
    """
    train, allowed = recipe.train, (memory - KEPT_FREE) * ESTIMATED
    spread = (HPZ, ZERO3) if several_nodes(ranks, node or ranks_per_node()) else (ZERO3,)
    files = (ZERO2, *spread) if train.deepspeed == AUTO else (train.deepspeed,)
    policies = POLICIES if train.checkpointing == AUTO else (train.checkpointing,)
    for candidate in (_with(recipe, file, policy) for file in files for policy in policies):
        plan = plan_memory(candidate, ranks, key_width, model, tokens, node)
        if plan.training <= allowed:
            break
    if plan.evaluation > allowed:
        # No setting chosen here changes this: evaluation needs the complete model on each GPU under every ZeRO stage.
        log.warning(
            "Generating %d answers at once takes %.1f GiB by the memory plan, more than the %.1f GiB that are "
            "available; lower evaluate.batch.",
            recipe.evaluate.batch,
            plan.evaluation / GIB,
            allowed / GIB,
        )
    return candidate


def gpu_memory(device: torch.device) -> int:
    """Bytes of a GPU's memory."""
    return torch.cuda.get_device_properties(device).total_memory


def without_gpus(recipe: Recipe) -> Recipe:
    """The recipe with `auto` replaced by the values for CPUs, without a memory plan: ZeRO-3, no recomputation."""
    train = recipe.train
    return _with(
        recipe,
        ZERO3 if train.deepspeed == AUTO else train.deepspeed,
        POLICIES[0] if train.checkpointing == AUTO else train.checkpointing,
    )


def least_for_zero2(recipe: Recipe, ranks: int, key_width: int, model: nn.Module, tokens: Tokens) -> int:
    """Bytes of GPU memory from which `train.deepspeed: auto` is resolved to ZeRO-2."""
    policy = POLICIES[-1] if recipe.train.checkpointing == AUTO else recipe.train.checkpointing
    plan = plan_memory(_with(recipe, ZERO2, policy), ranks, key_width, model, tokens)
    return int(plan.training / ESTIMATED) + KEPT_FREE


def _with(recipe: Recipe, file: str, policy: str) -> Recipe:
    train = recipe.train.model_copy(update={"deepspeed": file, "checkpointing": policy})
    return recipe.model_copy(update={"train": train})
