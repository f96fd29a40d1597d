"""Changes to what the decoder's layers read: their hidden states, their attention mask, and their cache.

A change is a hook before the layer's own call, so that a layer whose activations are recomputed
(`pipeline.backbones.recompute`) is given the changed values again without the hook.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipeline.backbones.attentions import MASKS
from pipeline.backbones.sharded import is_elsewhere
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.backbones.lmm import LMM


@dataclass(frozen=True)
class LayerInputs:
    """What a decoder layer reads of n tokens of B sequences, with the M keys that they attend to."""

    hidden: Tensor  # [B, n, D]
    mask: Tensor | None  # [B or 1, 1, n, M] bool, or float to be added; None: causal without padding
    cache: Any  # past_key_values; None without a cache


Change = Callable[[LayerInputs], LayerInputs]


@contextlib.contextmanager
def changed_layers(lmm: LMM, changes: Mapping[int, Change]) -> Iterator[None]:
    """While the block runs, these layers of the decoder, by number, read what their changes make of their inputs.

    A layer that another rank computes reads nothing here.
    """
    require_usual_layers(lmm)
    layers: Any = lmm.decoder.layers
    handles = [
        layers[number].register_forward_pre_hook(_hook(change), with_kwargs=True)
        for number, change in changes.items()
        if not is_elsewhere(layers[number])
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(change: Change) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    def hook(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden = given[0] if given else named["hidden_states"]
        read = change(LayerInputs(hidden, named.get("attention_mask"), named.get("past_key_values")))
        named = {**named, "attention_mask": read.mask, "past_key_values": read.cache}
        return ((read.hidden, *given[1:]), named) if given else (given, {**named, "hidden_states": read.hidden})

    return hook


def require_usual_layers(lmm: LMM) -> None:
    """Raise UserError unless the decoder's layers take hidden states, mask and cache by transformers' usual names."""
    kind, layers = lmm.family.kind, getattr(lmm.decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise UserError(
            f"The decoder of {kind} has no list `layers`, so nothing can be added to its layers; expected a method "
            "whose modules stand at the input, such as modalprompt."
        )
    layer: Any = type(layers[0])  # hashable, which type checkers doubt of a module's class
    missing = _missing_arguments(layer)
    if missing:
        raise UserError(
            f"The decoder layers of {kind} ({type(layers[0]).__name__}) take no {', '.join(missing)}, so nothing can "
            "be added to them; expected a method whose modules stand at the input, such as modalprompt."
        )


@functools.cache
def _missing_arguments(layer: type[nn.Module]) -> tuple[str, ...]:
    """Those of the usual arguments that a class of layers does not take; asked for with every token."""
    taken = inspect.signature(layer.forward).parameters
    return tuple(name for name in ("hidden_states", "attention_mask", "past_key_values") if name not in taken)


def require_masks(used: str, what: str) -> None:
    """Raise UserError where attention `used` takes no mask with a row per position, which `what` needs."""
    if used not in MASKS:
        raise UserError(
            f"{what} with attention '{used}', which takes no mask with a row per position; expected "
            f"{' or '.join(MASKS)}. Set model.attn_implementation."
        )


def attention_of(lmm: LMM) -> str:
    """The decoder's implementation of attention."""
    return str(lmm.decoder.config._attn_implementation)  # type: ignore[union-attr]


def full_mask(inputs: LayerInputs, keys: int) -> Tensor:
    """The layer's mask as a tensor [B or 1, 1, n, M] for M = `keys`; where it has none, the causal one."""
    if inputs.mask is not None:
        return inputs.mask[..., :keys]
    queries = inputs.hidden.shape[1]
    columns = torch.arange(keys, device=inputs.hidden.device)
    return (columns <= columns[-queries:, None])[None, None]


def without_keys(mask: Tensor, hidden: Tensor) -> Tensor:
    """A mask [B or 1, 1, n, M] in which the keys with the flag `hidden` [B, M] are not attended to."""
    flags = hidden[:, None, None]
    if mask.dtype == torch.bool:
        return mask & ~flags
    return mask.masked_fill(flags, torch.finfo(mask.dtype).min)
