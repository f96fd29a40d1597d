"""Secondary shards inside a node (hpZ of ZeRO++, arXiv 2306.10209, section 3.2): the number of ranks per copy.

With hpZ every node has a second copy of the weights, sharded over its GPUs. Frozen weights never change, so the copy
stays valid, and weights are gathered inside nodes only.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from pipeline.errors import UserError
from pipeline.ranks.environment import ranks_per_node

KEY = "zero_hpz_partition_size"
AUTO = "auto"


def with_node_size(
    config: dict[str, Any], world_size: int, env: Mapping[str, str] = os.environ, node: int | None = None
) -> dict[str, Any]:
    """Return a DeepSpeed configuration with `auto` replaced by the ranks per node, or by 1 (off) on a single node.

    Args:
        config: a DeepSpeed configuration.
        world_size: the number of ranks.
        env: the environment variables, from which the ranks per node are read if `node` is None.
        node: the ranks per node, agreed by all ranks (`pipeline.ranks.world.agreed_node_size`).

    Raises:
        UserError: a number that does not divide the ranks.
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
