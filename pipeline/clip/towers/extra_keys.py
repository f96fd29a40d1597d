"""Prompts as extra keys and values of one block, inserted by hooks that are removed after one forward pass.

A block's prompts pass its first layer norm and stand beside its tokens in the attention; their own rows are dropped
again, so they never become tokens and the sequence keeps its length. Text prompts stand in front of the start token,
image prompts behind the patches. No position embedding is added.

In a search a block has several options of prompts, and its attention output is the weighted sum of theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad


@dataclass(frozen=True)
class Mixed:
    """The options of one block in a search.

    `prompts` [n, D] each are the options with prompts; `weights` [C + 1] are those of no prompt and of each of them.
    `plain` computes one attention per option, as published, instead of the equal and faster `mixed_attention`.
    """

    prompts: tuple[Tensor, ...]
    weights: Tensor
    plain: bool = False


@contextmanager
def extra_keys(layers: nn.ModuleList, added: Mapping[int, Tensor | Mixed], front: bool) -> Iterator[None]:
    """Within this context blocks have extra keys and values.

    Args:
        layers: the blocks of a CLIP or SigLIP tower.
        added: prompts by block: [n, D], or the options of a search.
        front: whether the prompts stand before the tokens (text) or behind them (images).
    """
    with ExitStack() as stack:
        for block, prompts in added.items():
            layer: Any = layers[block]
            if not isinstance(prompts, Mixed):
                stack.enter_context(_beside(layer, prompts, front))
            elif prompts.plain:
                stack.enter_context(_forward_of(layer.self_attn, _one_by_one(layer, prompts, front)))
            else:
                stack.enter_context(_forward_of(layer.self_attn, _at_once(layer, prompts)))
        yield


@contextmanager
def _beside(layer: Any, prompts: Tensor, front: bool) -> Iterator[None]:
    """Hooks on the block's attention: prompts enter with the tokens, and their rows leave before the output."""
    count = len(prompts)

    def enter(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        tokens = inputs[0] if inputs else named["hidden_states"]
        mask = inputs[1] if len(inputs) > 1 else named.get("attention_mask")
        with_prompts = {"hidden_states": _with(layer, tokens, prompts, front), "attention_mask": _seen(mask, count)}
        return inputs[2:], {**named, **with_prompts}

    def leave(_module: nn.Module, _inputs: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return _without(output[0], count, front), *output[1:]

    handles = [
        layer.self_attn.register_forward_pre_hook(enter, with_kwargs=True),
        layer.self_attn.register_forward_hook(leave),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _with(layer: Any, tokens: Tensor, prompts: Tensor, front: bool) -> Tensor:
    """Tokens [R, T, D] and the normed prompts [n, D] beside them."""
    rows = layer.layer_norm1(prompts.to(tokens.dtype)).expand(len(tokens), -1, -1)
    return torch.cat([rows, tokens] if front else [tokens, rows], dim=1)


def _without(tokens: Tensor, count: int, front: bool) -> Tensor:
    return tokens[:, count:] if front else tokens[:, : tokens.shape[1] - count]


def _seen(mask: Tensor | None, count: int) -> Tensor | None:
    """An attention mask [R, 1, T, T] with `count` rows and columns in front, which all may see.

    None stays None: attention is then causal as a whole, or not masked. Only text towers have a mask, whose prompts
    stand in front.
    """
    if mask is None:
        return None
    return pad(mask, (count, 0, count, 0), value=1 if mask.dtype == torch.bool else 0)


@contextmanager
def _forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within this context the module computes `forward`; hooks cannot replace a computation."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward  # the instance's attribute: the class's method is there again


def _one_by_one(layer: Any, mixed: Mixed, front: bool) -> Callable[..., Any]:
    """The weighted sum of one attention of the block per option."""
    attend = layer.self_attn.forward

    def forward(hidden_states: Tensor, attention_mask: Tensor | None = None, **named: Any) -> tuple[Tensor, None]:
        weights = mixed.weights.to(hidden_states.dtype)
        total = weights[0] * attend(hidden_states, attention_mask, **named)[0]
        for weight, prompts in zip(weights[1:], mixed.prompts, strict=True):
            whole = _with(layer, hidden_states, prompts, front)
            output = attend(whole, _seen(attention_mask, len(prompts)), **named)[0]
            total = total + weight * _without(output, len(prompts), front)
        return total, None

    return forward


def _at_once(layer: Any, mixed: Mixed) -> Callable[..., Any]:
    """The same sum from one attention over the tokens, which all options share."""
    attention = layer.self_attn

    def forward(
        hidden_states: Tensor, attention_mask: Tensor | None = None, is_causal: bool | None = None, **_named: Any
    ) -> tuple[Tensor, None]:
        def heads(rows: Tensor) -> Tensor:
            """Rows [.., T, D] by head: [.., H, T, D / H]."""
            return rows.unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(-3, -2)

        rows = layer.layer_norm1(torch.cat(mixed.prompts).to(hidden_states.dtype))
        causal = attention.is_causal if is_causal is None else is_causal
        found = mixed_attention(
            heads(attention.q_proj(hidden_states)) * attention.scale,
            (heads(attention.k_proj(hidden_states)), heads(attention.v_proj(hidden_states))),
            (heads(attention.k_proj(rows)), heads(attention.v_proj(rows))),
            ([len(prompts) for prompts in mixed.prompts], mixed.weights),
            _bias(attention_mask, causal, hidden_states),
        )
        return attention.out_proj(found.transpose(1, 2).flatten(2).to(hidden_states.dtype)), None

    return forward


def _bias(mask: Tensor | None, causal: bool, tokens: Tensor) -> Tensor | None:
    """What is added to the scores of the tokens, [T, T] or [R, 1, T, T]: 0, or minus infinity for what is not seen."""
    if mask is None:
        if not causal:
            return None
        count = tokens.shape[1]
        return torch.full((count, count), float("-inf"), device=tokens.device).triu(1)
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, float("-inf"))
    return mask


def mixed_attention(
    queries: Tensor,
    tokens: tuple[Tensor, Tensor],
    prompts: tuple[Tensor, Tensor],
    options: tuple[list[int], Tensor],
    bias: Tensor | None,
) -> Tensor:
    """The weighted sum [R, H, T, d], over the options, of attention over the tokens and the option's prompts.

    Softmax over tokens and prompts is that over the tokens alone, scaled by the share that the tokens have of both
    normalisers. So scores of the tokens are computed once, and the sum over options is one sum over all prompts with
    weights that include the option's.

    Args:
        queries: scaled queries [R, H, T, d].
        tokens: keys and values [R, H, T, d] of the tokens.
        prompts: keys and values [H, N, d] of the prompts of all options, one option after the other.
        options: how many prompts each option has, N in all, and the weights [C + 1] of no prompt and of each option.
        bias: added to the scores of the tokens.
    """
    lengths, weights = options
    exact = torch.promote_types(queries.dtype, torch.float32)  # exponentials of half precision are too coarse
    scores = (queries @ tokens[0].mT).to(exact)
    scores = scores if bias is None else scores + bias.to(exact)
    own = scores.logsumexp(-1, keepdim=True)
    kept, shares = weights[0].to(exact), []
    extra = (queries @ prompts[0].mT).to(exact)
    for weight, part in zip(weights[1:].to(exact), extra.split(lengths, dim=-1), strict=True):
        both = torch.logaddexp(own, part.logsumexp(-1, keepdim=True))
        kept = kept + weight * (own - both).exp()
        shares.append(weight * (part - both).exp())
    values = ((scores - own).exp().to(queries.dtype) @ tokens[1]).to(exact)
    return kept * values + (torch.cat(shares, dim=-1).to(queries.dtype) @ prompts[1]).to(exact)
