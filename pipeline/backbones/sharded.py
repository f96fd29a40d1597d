"""One frozen model on several ranks: each of its layers is on one of them, which computes it for all.

The ranks of a replica call the same modules in the same order with the same inputs. A layer of the decoder or of the
vision tower, the input embedding and the output layer are computed by the rank that has their weights, and the others
receive the output by a broadcast. What is left (norms, projector, patch embedding, buffers) is small and complete on
every rank. So no weight is communicated, only hidden states [B, N, D] per layer, and a layer's keys and values exist on
its own rank only (docs/design.md 7.4).

Whoever acts on layers asks `is_elsewhere` first. The weights of a layer that is elsewhere are a single zero, expanded
to their shapes, so that sizes, precision and device can be read as usual.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

# The base class of the layers of transformers' decoders and vision towers; compared by name, because importing
# transformers takes seconds and the memory plan is made without it.
LAYER_CLASS = "GradientCheckpointingLayer"
COMPUTED = "computed"  # the attribute with what a divided module computes, or what stands in for it elsewhere


@dataclass(frozen=True)
class Place:
    """This rank among the ranks of its replica; `group` is their process group."""

    rank: int
    size: int
    group: Any


class Counted(Protocol):
    """A running count of floating-point operations."""

    operations: int


class Shards:
    """The division of a loaded model over the ranks of a replica.

    Args:
        model: transformers' model; the weights of other ranks' modules may be on the meta device.
        ranks: the rank of each divided module, see `ranks_of`.
        place: this rank.
        device: that of this rank's weights.
    """

    def __init__(self, model: Any, ranks: Mapping[str, int], place: Place, device: torch.device) -> None:
        self.place, self.device = place, device
        self._global = [dist.get_global_rank(place.group, rank) for rank in range(place.size)]
        self._count: Counted | None = None
        self._inside = 0  # operations of this rank's own modules
        embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
        for name, rank in ranks.items():
            module = model.get_submodule(name)
            here = rank == place.rank
            if here:
                stand_in = module.forward
            elif module is embedding:
                stand_in = partial(_wide, module.weight.shape[1], module.weight.dtype)
            elif module is output:
                stand_in = partial(_scored, module.weight.shape[0])
            else:
                stand_in = partial(_unread, module)
            setattr(module, COMPUTED, stand_in)
            module.elsewhere = not here
            module.forward = partial(self._call, module, name, rank)
            if not here:
                _let_go(module, device)

    def _call(self, module: Any, name: str, rank: int, *given: Any, **named: Any) -> Tensor:
        """The output of a divided module, on every rank."""
        if rank == self.place.rank:
            before = self._operations
            output = module.computed(*given, **named)
            self._inside += self._operations - before
            if not isinstance(output, Tensor):
                raise TypeError(f"{name} returns a {type(output).__name__}; only tensors are sent to the other ranks")
            output = output.contiguous()
        else:
            like = module.computed(*given, **named)
            output = torch.empty(like.shape, dtype=like.dtype, device=self.device)
        return self._sent(output, rank)

    def _sent(self, values: Tensor, rank: int) -> Tensor:
        """These values of the replica's rank, in place on the others."""
        if values.numel():
            dist.broadcast(values, src=self._global[rank], group=self.place.group)
        return values

    def agreed(self, values: Tensor) -> Tensor:
        """The values [n] of the replica's first rank, on all of its ranks.

        GPUs of different kinds may round differently, and ranks that chose other tokens would wait for each other.
        """
        return self._sent(values.contiguous(), 0)

    def watch(self, count: Counted | None) -> None:
        """From now on find out which of the counted operations are those of this rank's own modules."""
        self._count, self._inside = count, 0

    def sum_up(self) -> None:
        """Make the watched count that of the whole replica; its ranks call it together.

        What every rank computes for itself counts once.
        """
        if self._count is None:
            return
        rest = self._count.operations - self._inside
        total = torch.tensor([self._inside], dtype=torch.int64, device=self.device)
        dist.all_reduce(total, group=self.place.group)
        self._count.operations = rest + int(total)
        self._count = None

    @property
    def _operations(self) -> int:
        return 0 if self._count is None else self._count.operations


def is_elsewhere(module: Any) -> bool:
    """Whether another rank has the weights of this layer and computes it."""
    return bool(getattr(module, "elsewhere", False))


def divided_modules(model: Any) -> dict[str, nn.Module]:
    """The modules of a model that are divided over ranks, by name, in the order of the model."""
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if module is embedding or module is output or _is_layer(module)
    }


def ranks_of(model: Any, size: int) -> dict[str, int]:
    """The rank, of `size`, that has each of the `divided_modules`; `model` may be on the meta device.

    Largest first, each goes to the rank that has least. An output layer with the input embedding's weights goes to the
    same rank.
    """
    modules = divided_modules(model)
    sizes = {name: own_bytes(module) for name, module in modules.items()}
    held, ranks, seen = [0] * size, dict[str, int](), dict[int, int]()
    for name in sorted(modules, key=lambda name: -sizes[name]):  # stable: layers of one size keep their order
        tied = next((seen[id(p)] for p in modules[name].parameters() if id(p) in seen), None)
        rank = held.index(min(held)) if tied is None else tied
        if tied is None:
            held[rank] += sizes[name]
        seen |= {id(parameter): rank for parameter in modules[name].parameters()}
        ranks[name] = rank
    return ranks


def own_bytes(module: nn.Module) -> int:
    """Bytes of the parameters of a module."""
    return sum(parameter.nbytes for parameter in module.parameters())


def held_bytes(module: nn.Module) -> int:
    """Bytes that this rank holds of a module's parameters and buffers."""
    storages = {
        storage.data_ptr(): storage.nbytes()
        for storage in (tensor.untyped_storage() for tensor in [*module.parameters(), *module.buffers()])
    }
    return sum(storages.values())


def _is_layer(module: nn.Module) -> bool:
    return any(base.__name__ == LAYER_CLASS for base in type(module).__mro__)


def _let_go(module: nn.Module, device: torch.device) -> None:
    """Replace the weights of a module by a single zero with their shape."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                nothing = torch.zeros((), dtype=weight.dtype, device=device).expand(weight.shape)
                part._parameters[name] = nn.Parameter(nothing, requires_grad=False)


def _unread(layer: Any, hidden_states: Tensor, *_: Any, past_key_values: Any = None, **__: Any) -> Tensor:
    """Stands in for a layer: has the shape of its output, and makes the columns of its tokens in the cache.

    Masks and positions follow from their number. They are one number wide, because to transformers a layer whose keys
    have no elements has read nothing.
    """
    if past_key_values is not None:
        nothing = hidden_states.new_zeros(len(hidden_states), 1, hidden_states.shape[1], 1)
        past_key_values.update(nothing, nothing, layer.self_attn.layer_idx)
    return hidden_states


def _wide(width: int, dtype: torch.dtype, tokens: Tensor) -> Tensor:
    """Stands in for the input embedding: the shape of its output for these tokens."""
    return torch.empty(*tokens.shape, width, dtype=dtype, device="meta")


def _scored(scores: int, hidden: Tensor) -> Tensor:
    """Stands in for the output layer: the shape of its output for these hidden states."""
    return torch.empty(*hidden.shape[:-1], scores, dtype=hidden.dtype, device="meta")
