"""DeepSpeed's configuration: the recipe's DeepSpeed file, merged with the settings that only the recipe may have."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pipeline.config.paths import PACKAGE, PROJECT
from pipeline.config.train import AUTO, ZERO2, ZERO3, TrainConfig, divisors
from pipeline.errors import UserError, nearest
from pipeline.files.strict_text import load_json
from pipeline.training.hpz import with_node_size

# A wheel has the folder inside the package, a checkout at its top.
DS_CONFIGS = (PACKAGE if (PACKAGE / "ds_configs").is_dir() else PROJECT) / "ds_configs"
# Keys that a DeepSpeed file must not set, and the recipe's fields for them: set twice, one would silently be ignored.
RECIPE_OWNS = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch and train.micro_batch",
    "gradient_clipping": "train.clip",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "optimizer": "train.lr_prompt, train.lr_head, train.betas and train.weight_decay",
    "scheduler": "train.schedule and train.warmup",
}


def accumulation(train: TrainConfig, world_size: int) -> tuple[int, int]:
    """Return (samples per rank and forward, accumulation steps) that make up the global batch on `world_size` ranks.

    Raises UserError that lists the world sizes which divide the global batch.
    """
    whole, micro = train.global_batch, train.micro_batch
    if whole % (world_size * (micro or 1)):
        fitting = ", ".join(map(str, divisors(whole // (micro or 1))))
        batch = f"global batch {whole}" + (f" in micro batches of {micro}" if micro else "")
        # Gradients are sums over the batch, so a smaller micro batch changes no result.
        smaller = math.gcd(whole // world_size, micro) if micro and not whole % world_size else None
        other = "" if smaller is None else f", set train.micro_batch to {smaller}"
        raise UserError(
            f"{world_size} ranks do not divide the {batch}; start {fitting} ranks{other} or change the batch."
        )
    micro = micro or whole // world_size
    return micro, whole // (micro * world_size)


def deepspeed_config(train: TrainConfig, dtype: str, world_size: int, node: int | None = None) -> dict[str, Any]:
    """Return the DeepSpeed configuration of a run: the recipe's DeepSpeed file plus the recipe's own settings.

    Args:
        train: the recipe's training settings.
        dtype: the model's precision.
        world_size: the number of ranks.
        node: the ranks per node, agreed by all ranks; None: from the environment.

    Raises:
        UserError: the file is missing, is not JSON, or sets a key that belongs to the recipe.
    """
    config = with_node_size(_file_of(train), world_size, node=node)
    micro, steps = accumulation(train, world_size)
    return with_recipe(config, micro, steps, train.clip, dtype)


def require_whole_weights(train: TrainConfig, quantization: str) -> None:
    """Raise UserError where the DeepSpeed file is for ZeRO-3 and the model is quantised or compiled."""
    if quantization == "none" and train.compile == "none":
        return
    config = _file_of(train)
    if int((config.get("zero_optimization") or {}).get("stage", 0)) != 3:
        return
    if quantization != "none":
        raise UserError(
            f"model.quantization {quantization} is not possible under ZeRO-3 ({train.deepspeed}), which partitions "
            "weights in the precision of the step while they are loaded, before they could be quantised; set "
            f"train.deepspeed to {ZERO2}."
        )
    raise UserError(
        f"train.compile {train.compile} is not possible under ZeRO-3 ({train.deepspeed}), which changes the weights of "
        f"a layer whenever it runs; set train.deepspeed to {ZERO2}, or train.compile to none."
    )


def with_recipe(config: dict[str, Any], micro: int, steps: int, clip: float | None, dtype: str) -> dict[str, Any]:
    """Return a DeepSpeed configuration with the recipe's settings.

    Args:
        config: the content of a DeepSpeed file.
        micro: samples per rank and forward pass.
        steps: accumulation steps.
        clip: the largest gradient norm; None: no clipping.
        dtype: the model's precision.
    """
    return {
        **_float32_sums(config, dtype),
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": steps,
        "gradient_clipping": clip or 0.0,
        "bf16": {"enabled": dtype == "bfloat16"},
        # The engine passes a torch optimizer; DeepSpeed's CPU Adam is no faster for so few trainables.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _float32_sums(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Return the configuration with gradients accumulated and reduced in float32, unless the file sets a precision.

    DeepSpeed's default for both is the model's precision. In bfloat16 a sum over 16 ranks is off by half a percent,
    over 512 by several percent, and accumulation rounds once more per micro-batch. The cost of float32 is small: only
    the trainables, a few megabytes, have gradients. Without ZeRO DeepSpeed reduces in float32 but refuses to accumulate
    in it.
    """
    if dtype != "bfloat16":
        return config
    config = {"communication_data_type": "fp32", **config}
    if config.get("zero_optimization", {}).get("stage", 0):
        config["data_types"] = {"grad_accum_dtype": "fp32", **config.get("data_types", {})}
    return config


def _file_of(train: TrainConfig) -> dict[str, Any]:
    """The content of the recipe's DeepSpeed file; an unresolved `auto` is ZeRO-3, as on CPUs."""
    return deepspeed_file(ZERO3 if train.deepspeed == AUTO else train.deepspeed)


def deepspeed_file(name: str) -> dict[str, Any]:
    """The content of a DeepSpeed file; UserError when it is missing, not JSON, or sets a key of `RECIPE_OWNS`."""
    path, shipped_path = Path(name), DS_CONFIGS.parent / name
    if not path.exists() and shipped_path.exists():
        path = shipped_path
    if not path.is_file():
        shipped = sorted(f"ds_configs/{found.name}" for found in DS_CONFIGS.glob("*.json"))
        raise UserError(
            f"train.deepspeed: no file '{name}'; expected one of {', '.join(shipped)} or your own."
            + nearest(name, shipped)
        )
    try:
        config = load_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"'{path}' is not JSON ({error}); correct it.") from error
    except UserError as error:
        raise UserError(f"'{path}': {error}.") from None
    if not isinstance(config, dict):
        raise UserError(f"'{path}' is not a DeepSpeed configuration; expected a JSON object.")
    for key, field in RECIPE_OWNS.items():
        if key in config:
            raise UserError(f"'{path}' sets {key}, which belongs to the recipe; remove it there and set {field}.")
    return config
