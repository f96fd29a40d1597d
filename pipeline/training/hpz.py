"""Secondary shards inside a node (hpZ of ZeRO++, arXiv 2306.10209, section 3.2): which ranks share a copy.

With it every node holds a whole second copy of the weights, divided over its GPUs. Frozen weights never change, so that
copy stays good: after the first step they are gathered inside the nodes alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from pipeline.errors import UserError

KEY = "zero_hpz_partition_size"
AUTO = "auto"
USUAL_NODE = 8  # GPUs per node when a job is planned on a machine that is not part of it


def with_node_size(
    config: dict[str, Any], world_size: int, env: Mapping[str, str] = os.environ, node: int | None = None
) -> dict[str, Any]:
    """Return a DeepSpeed configuration with `auto` replaced by the ranks per node, or by 1 (off) on a single node.

    `node` is that number where all ranks know it (`agreed_node_size`), None to go by the environment. Raises UserError
    for a number that does not divide the ranks.
    """
    zero = config.get("zero_optimization")
    if not isinstance(zero, dict) or KEY not in zero:
        return config
    size = zero[KEY]
    if size == AUTO:
        local = node or ranks_per_node(env)
        size = local if several_nodes(world_size, local) else 1
    elif not isinstance(size, int) or size < 1 or world_size % size:
        raise UserError(
            f"zero_optimization.{KEY} is {size!r} in the file of train.deepspeed, and the run has {world_size} ranks; "
            f"expected {AUTO!r}, or the number of GPUs of one node, which divides the ranks."
        )
    return {**config, "zero_optimization": {**zero, KEY: size}}


def several_nodes(ranks: int, node: int) -> bool:
    """Return whether the ranks fill several nodes of `node` ranks."""
    return 1 < node < ranks and ranks % node == 0


def agreed_node_size() -> int:
    """Return the ranks per node, the same on every rank; 1 where nodes differ. All ranks must call it.

    Each rank knows its own node only, and ranks with different groups would wait for each other for ever.
    """
    from pipeline.ranks.world import gather_objects

    sizes = set(gather_objects(ranks_per_node()))
    return sizes.pop() if len(sizes) == 1 else 1


def ranks_per_node(env: Mapping[str, str] = os.environ) -> int:
    """Return the ranks on this node as the launcher says, else one per GPU, else the usual eight.

    A task of Slurm may see one GPU of its node only, so Slurm's own numbers come first.
    """
    told = env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or _tasks_of_slurm(env)
    if told:
        return int(told)
    import torch

    return torch.cuda.device_count() or USUAL_NODE


def _tasks_of_slurm(env: Mapping[str, str]) -> str | None:
    """Return the tasks of each node of a Slurm step, None for a process that is not one of them or unequal nodes.

    Slurm writes "8(x2)" for two nodes of eight tasks, "8,4" for unequal ones.
    """
    tasks = env.get("SLURM_STEP_TASKS_PER_NODE", "") if "SLURM_PROCID" in env else ""
    found = re.fullmatch(r"(\d+)(\(x\d+\))?", tasks)
    return found[1] if found else None
