"""Which activations a run keeps: as many as fit into its GPUs by the memory plan."""

from __future__ import annotations

import logging

import torch
from torch import nn

from pipeline.check_model import CheckedModel
from pipeline.config import Recipe
from pipeline.distributed import World, broadcast_object
from pipeline.memory import GIB, Tokens, plan_memory
from pipeline.model_shape import meta_model

POLICIES = ("none", "selective", "full")  # cheapest first
# What is left to CUDA itself, and to what the plan's estimates and the allocator's gaps may add.
KEPT_FREE, ESTIMATED = 1 * GIB, 0.92


def chosen_policy(recipe: Recipe, world: World, key_width: int) -> str:
    """The recipe's activation checkpointing, or what `auto` stands for on these ranks: the same on all of them.

    Without GPUs that is none: the host's memory is not planned.
    """
    if recipe.train.checkpointing != "auto":
        return recipe.train.checkpointing
    if world.device.type == "cpu":
        return POLICIES[0]
    policy = None
    if world.main:
        memory = torch.cuda.get_device_properties(world.device).total_memory
        tokens = CheckedModel(recipe, online=False).tokens([])
        policy = fitting_policy(recipe, world.size, key_width, meta_model(recipe), tokens, memory)
        logging.getLogger(__name__).info("activation checkpointing: %s", policy)
    # Layers are gathered in the same order on all ranks only where all recompute the same.
    return broadcast_object(policy) or POLICIES[-1]


def fitting_policy(recipe: Recipe, ranks: int, key_width: int, model: nn.Module, tokens: Tokens, memory: int) -> str:
    """The cheapest policy with which training fits into `memory` bytes per GPU by the plan, `full` where none does.

    `model` is on the meta device; see `plan_memory`.
    """
    for policy in POLICIES[:-1]:
        train = recipe.train.model_copy(update={"checkpointing": policy})
        plan = plan_memory(recipe.model_copy(update={"train": train}), ranks, key_width, model, tokens)
        if plan.training <= (memory - KEPT_FREE) * ESTIMATED:
            return policy
    return POLICIES[-1]
