"""The error of a run whose GPU memory was exceeded, with the recipe fields that reduce it.

The memory plan and the batches are deterministic, so a restart alone would fail in the same way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from pipeline.config.evaluate import EvaluateConfig
from pipeline.config.train import TrainConfig
from pipeline.errors import OutOfMemory


@contextlib.contextmanager
def out_of_memory_advice(section: TrainConfig | EvaluateConfig, quantised: bool = False) -> Iterator[None]:
    """Raise OutOfMemory with advice in place of torch.OutOfMemoryError; `section` is that of the work.

    `quantised` says whether the model's weights are, so that ZeRO-3 is no way out.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(_sentence(section, error, quantised)) from error


def _sentence(section: TrainConfig | EvaluateConfig, error: BaseException, quantised: bool) -> str:
    said = (str(error).splitlines() or ["out of memory"])[0].split(". ")[0]
    if isinstance(section, TrainConfig):
        work, helps = "training", _training(section, quantised)
    else:
        work, helps = "evaluation", _evaluation(section)
    return (
        f"The GPU's memory was not enough for {work} ({said}). Finished stages and answers are kept, but the same "
        f"command would fail again. {helps}; `python -m pipeline check` shows the memory plan. Check also that no "
        "other process uses the GPU."
    )


def _training(train: TrainConfig, quantised: bool) -> str:
    fewer = "" if train.micro_batch == 1 else "set train.micro_batch to a smaller divisor of train.global_batch"
    again = "" if train.checkpointing == "full" else "train.checkpointing to full"
    shared = "" if quantised or "zero3" in train.deepspeed else "train.deepspeed to ds_configs/zero3.json"
    ways = [way for way in (fewer, again, shared, "or give images fewer tokens with model.image_tokens") if way]
    sentence = ", ".join(ways).removeprefix("or ")
    return sentence[0].upper() + sentence[1:]


def _evaluation(section: EvaluateConfig) -> str:
    batch = section.batch
    smaller = f"Lower evaluate.batch (now {batch})" if batch > 1 else "evaluate.batch is 1 already"
    divided = "" if section.engine == "sharded" else ", on several GPUs set evaluate.engine to sharded"
    return f"{smaller}{divided}, or give images fewer tokens with model.image_tokens"
