"""Prefixes of keys and values computed anew: a Llama's layers from their weights, one sample at a time.

The attention is written out: projections, rotary embedding, scores, and a softmax whose sum has the prefix's terms,
each times its weight. Of the project it takes the frozen model alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.backbones.lmm import LMM


@dataclass(frozen=True)
class Part:
    """What one module has in one layer."""

    keys: Tensor  # [L, heads, d]
    values: Tensor  # [L, heads, d]
    weight: float | Tensor = 1.0


def rotated(states: Tensor, base: float) -> Tensor:
    """Rotary embedding of states [N, heads, d] at positions 0 to N - 1."""
    count, _, size = states.shape
    frequencies = base ** (-torch.arange(0, size, 2) / size)
    angles = torch.arange(count)[:, None] * frequencies  # [N, d / 2]
    cosine, sine = angles.cos()[:, None], angles.sin()[:, None]
    first, second = states[..., : size // 2], states[..., size // 2 :]
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


def hidden_of(lmm: LMM, tokens: Tensor, prefixes: Mapping[int, Sequence[Part]]) -> Tensor:
    """Last hidden states [N, D] of the tokens [N, D], with the modules' keys and values of each layer."""
    decoder: Any = lmm.decoder
    config = decoder.config
    base = config.rope_parameters["rope_theta"]
    states = tokens
    for number, layer in enumerate(decoder.layers):
        attention, normed = layer.self_attn, layer.input_layernorm(states)
        size = attention.head_dim
        queries, keys, values = (
            project(normed).unflatten(-1, (-1, size))
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        queries, keys = rotated(queries, base), rotated(keys, base)
        exponentials = (torch.einsum("qhd,khd->hqk", queries, keys) / size**0.5).exp()
        exponentials = exponentials * torch.ones(len(tokens), len(tokens)).tril()
        total, summed = exponentials.sum(-1), torch.einsum("hqk,khd->hqd", exponentials, values)
        for part in prefixes.get(number, ()):
            more = part.weight * (torch.einsum("qhd,khd->hqk", queries, part.keys) / size**0.5).exp()
            total, summed = total + more.sum(-1), summed + torch.einsum("hqk,khd->hqd", more, part.values)
        read = (summed / total[..., None]).transpose(0, 1).flatten(1)
        states = states + attention.o_proj(read)
        states = states + layer.mlp(layer.post_attention_layernorm(states))
    return decoder.norm(states)
