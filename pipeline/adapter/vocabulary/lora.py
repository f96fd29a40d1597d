"""Low-rank updates in PEFT's format, one folder per task, for servers that take the name of one with each request."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.config.low_rank import BEFORE_DECODER, OUTPUT_LAYER
from pipeline.config.method import MethodOptions, choice_name
from pipeline.errors import UserError
from pipeline.files.atomic import write_json
from pipeline.methods import make_method
from pipeline.prompts.parts.base import entry_of
from pipeline.prompts.parts.low_rank import PREFIX, A, B, LowRankEntry
from pipeline.prompts.parts.projector import projector_of
from pipeline.prompts.pool import PromptPool

LORAS = "lora"  # folder of the checkpoint
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PRINT = 8  # digits of a module's fingerprint in its name, so that a server with other values is noticed


def require_loras(options: MethodOptions, pool: PromptPool, source: Path) -> None:
    """Raise UserError where modules are no low-rank updates of which each question gets one, as it was learned."""
    method = make_method(options)
    entry, otherwise = entry_of(method), "`serve --engine own` answers with them."
    if type(entry) is not LowRankEntry or pool.common:
        part = "none" if method.part is None else choice_name(method.part)
        raise UserError(
            f"{source} learned modules of the part {part} (method {method.name}); expected low-rank updates of each "
            f"task, the part low_rank. {otherwise}"
        )
    if method.routing.rule.most(len(pool)) != 1:
        raise UserError(
            f"The method {method.name} of {source} answers with several updates at once, and a request names one; "
            f"expected a rule that selects one, such as hard. {otherwise}"
        )
    other = [name for name in entry.layers(pool.tensors) if name in (*BEFORE_DECODER, OUTPUT_LAYER)]
    if other or projector_of(pool.shared):
        what = " and ".join([*other, *(["the image projector"] if projector_of(pool.shared) else [])])
        raise UserError(f"{source} updates {what}; expected updates of the decoder's linear layers alone. {otherwise}")


def served_names(pool: PromptPool) -> dict[str, str]:
    """What a server calls the module of each task."""
    return {name: f"{name}-{pool.fingerprint(number)[:PRINT]}" for number, name in enumerate(pool.names)}


def write_loras(folder: Path, options: MethodOptions, pool: PromptPool, decoder: str, dtype: torch.dtype) -> None:
    """Write the module of each task into a folder of its served name.

    `decoder` is the decoder's place in the model, by which PEFT names layers; `dtype` the precision of the run.
    """
    entry = entry_of(make_method(options))
    assert isinstance(entry, LowRankEntry)
    for number, name in enumerate(served_names(pool).values()):
        place = folder / name
        place.mkdir(parents=True)
        tensors = dict(_tensors(entry, pool, number, decoder, dtype))
        save_file(tensors, place / WEIGHTS, metadata={"format": "pt"})
        rank = rank_of(entry, pool)
        targets = sorted({layer.rpartition(".")[2] for layer in entry.layers(pool.tensors)})
        content = {"peft_type": "LORA", "r": rank, "lora_alpha": entry.scale * rank, "target_modules": targets}
        write_json(place / CONFIG, {**content, "bias": "none", "task_type": "CAUSAL_LM"})


def rank_of(entry: LowRankEntry, pool: PromptPool) -> int:
    """The rank of the updates."""
    return int(pool.tensors[PREFIX + entry.layers(pool.tensors)[0] + A].shape[1])


def _tensors(
    entry: LowRankEntry, pool: PromptPool, number: int, decoder: str, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    for layer in entry.layers(pool.tensors):
        for end, side in ((A, "lora_A"), (B, "lora_B")):  # [r, inputs] and [outputs, r], as PEFT has them
            values = pool.tensors[PREFIX + layer + end][number].to(dtype).contiguous()
            yield f"base_model.model.model.{decoder}.{layer}.{side}.weight", values
