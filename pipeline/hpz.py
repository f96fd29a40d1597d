"""Secondary shards inside a node (hpZ of ZeRO++, arXiv 2306.10209, section 3.2): which ranks share a copy.

With it every node holds a whole second copy of the weights, divided over its GPUs. Frozen weights never change, so that
copy stays good: after the first step they are gathered inside the nodes alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from pipeline.errors import UserError

KEY = "zero_hpz_partition_size"
AUTO = "auto"
USUAL_NODE = 8  # GPUs per node when a job is planned on a machine that is not part of it


def with_node_size(config: dict[str, Any], world_size: int, env: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Return a DeepSpeed configuration with `auto` replaced by the ranks per node, or by 1 (off) on a single node.

    Raises UserError for a number that does not divide the ranks.
    """
    zero = config.get("zero_optimization")
    if not isinstance(zero, dict) or KEY not in zero:
        return config
    size = zero[KEY]
    if size == AUTO:
        local = ranks_per_node(env)
        size = local if world_size > local and world_size % local == 0 else 1
    elif not isinstance(size, int) or size < 1 or world_size % size:
        raise UserError(
            f"zero_optimization.{KEY} is {size!r} in the file of train.deepspeed, and the run has {world_size} ranks; "
            f"expected {AUTO!r}, or the number of GPUs of one node, which divides the ranks."
        )
    return {**config, "zero_optimization": {**zero, KEY: size}}


def ranks_per_node(env: Mapping[str, str] = os.environ) -> int:
    """Return the ranks on this node as the launcher says, else one per GPU, else the usual eight."""
    told = env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE")
    if told:
        return int(told)
    import torch

    return torch.cuda.device_count() or USUAL_NODE
