"""How many ranks have one evaluation model together, and how much of it each of them has."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from pipeline.backbones.lmm_families import family_of
from pipeline.backbones.sharded import divided_modules, own_bytes, ranks_of
from pipeline.config.evaluate import EvaluateConfig
from pipeline.config.models import ModelConfig
from pipeline.errors import UserError


def ranks_per_replica(evaluate: EvaluateConfig, model: ModelConfig, ranks: int, node: int) -> int:
    """The ranks that have one model together; 1 unless `evaluate.engine` is sharded.

    Args:
        evaluate: the recipe's section.
        model: the recipe's section.
        ranks: number of ranks.
        node: ranks on each node, 1 where nodes differ.

    Raises:
        UserError: so many ranks cannot be divided, or the model cannot.
    """
    if evaluate.engine != "sharded":
        return 1
    if model.quantization != "none":
        raise UserError(
            f"evaluate.engine sharded is not possible with model.quantization {model.quantization}: only unquantised "
            "weights are divided over ranks. Set one of them to its default."
        )
    if ranks == 1:
        raise UserError(
            "evaluate.engine sharded divides the model over several ranks, and this run has one; start more "
            "(train.processes, or a launcher), or set evaluate.engine to replicas."
        )
    shards = min(node, ranks) if evaluate.shards == "auto" else evaluate.shards
    if shards == 1:
        raise UserError(
            "evaluate.shards auto takes the ranks of a node, and the nodes have different numbers of ranks, or one "
            f"each; set it to a number of ranks that divides {ranks}."
        )
    if ranks % shards:
        fitting = ", ".join(str(number) for number in range(2, ranks + 1) if ranks % number == 0)
        raise UserError(
            f"evaluate.shards: {ranks} ranks cannot be divided into models on {shards} ranks each; set it to one of "
            f"{fitting}, or start another number of ranks."
        )
    return shards


@dataclass(frozen=True)
class Division:
    """What the rank that has most has of a model on several ranks."""

    held: int  # bytes of weights and buffers
    layers: float  # share of the decoder's layers, whose keys and values it has

    @classmethod
    def of(cls, model: nn.Module, shards: int) -> Division:
        """That of a model, which may be on the meta device, over so many ranks, as `load_lmm` divides it."""
        ranks, modules = ranks_of(model, shards), divided_modules(model)
        kind: str = model.config.model_type  # type: ignore[union-attr, assignment]
        decoder: nn.Module = model.model.get_submodule(family_of(kind).decoder)  # type: ignore[union-attr]
        layers = {id(layer) for layer in decoder.layers}  # type: ignore[union-attr]
        held, decoding, seen = [0] * shards, [0] * shards, set[int]()
        for name, rank in ranks.items():
            module = modules[name]
            decoding[rank] += id(module) in layers
            if not any(id(parameter) in seen for parameter in module.parameters()):  # an output layer may be tied
                held[rank] += own_bytes(module)
            seen |= {id(parameter) for parameter in module.parameters()}
        whole = own_bytes(model) - sum(held) + sum(buffer.nbytes for buffer in model.buffers())  # on every rank
        return cls(max(held) + whole, max(decoding) / len(layers))
