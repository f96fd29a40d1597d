"""Every method, and every part with the methods that take any, of sizes for tiny models."""

from __future__ import annotations

from typing import Any

RANK = {"rank": 2, "alpha": 4.0}
# A dual prefix of one shared and one own layer, for decoders of two layers.
DUAL = {"general_layers": [0], "task_layers": [0, 1], "general_length": 2, "task_length": 3}
COMPONENTS = {"components": 2, "component_length": 2, "layers": [0, 1]}
POOL = {"pool_size": 4, "pool_length": 2, "chosen": 2}
SCHEDULE = {"prompt_length": 2, "depth": 2}

# Of a method with stages: what a recipe's section `method` says beside the name.
METHODS: dict[str, dict[str, Any]] = {
    "modalprompt": {"prompt_length": 4, "k": 2, "router": "prototype"},
    "modular": {**SCHEDULE, "add": 2, "remove": 1, "k": 2, "gate": None},
    "task_lora": RANK,
    "lora": RANK,
    "lora_merged": RANK,
    "olora": RANK,
    "moelora": {"rank": 4, "experts": 2, "alpha": 8.0},
    "hide": RANK,
    "disco": RANK,
    "core_moe": RANK,
    "ewc": {**RANK, "fisher_samples": 3},
    "lwf": RANK,
    "l2p": POOL,
    "dualprompt": DUAL,
    "coda": COMPONENTS,
    "sequential": {"prompt_length": 4},
    "independent": {"prompt_length": 4},
    "joint": {"prompt_length": 4},
}
PARTS: dict[str, dict[str, Any]] = {
    "input_rows": {},
    "low_rank": RANK,
    "deep": SCHEDULE,
    "prefix": {"prefix_length": 3},
    "prompt_pool": POOL,
    "dual_prefix": DUAL,
    "components": COMPONENTS,
    "fused_low_rank": RANK,
    "experts": METHODS["moelora"],
    "core": RANK,
}


def method_fields(name: str) -> dict[str, Any]:
    """The section `method` of a small one; `METHOD PART` with that part, `METHOD INSERTION` with rows elsewhere, and
    `METHOD dropout`."""
    method, _, other = name.partition(" ")
    if other == "dropout":
        return {"name": method, **METHODS[method], "dropout": 0.2, "targets": ["q_proj", "down_proj", "lm_head"]}
    if other in PARTS:
        return {"name": method, "part": {"name": other, **PARTS[other]} if PARTS[other] else other}
    return {"name": method, **METHODS[method], **({"insertion": other} if other else {})}
