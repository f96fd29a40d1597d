"""What the frozen decoder makes of rows behind its first token: where prompts of its layers start from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from pipeline.backbones.layer_hooks import Change, LayerInputs, changed_layers
from pipeline.backbones.lmm import LMM


@torch.no_grad()
def hidden_states_of(lmm: LMM, rows: Tensor) -> list[Tensor]:
    """The hidden states [L, D] with which rows [L, D] enter each layer, in float32 on the CPU.

    The rows stand directly behind the token that sequences begin with, as inserted ones do. Prompts of a layer that
    start from these states leave the first step what prompts at the input alone would make it. Under ZeRO-3 all ranks
    call this.
    """
    embeddings, inputs = _sequence(lmm, rows[None])
    found: list[Tensor] = []

    def recorded(read: LayerInputs) -> LayerInputs:
        found.append(read.hidden[0, 1:].float().cpu())
        return read

    changes: dict[int, Change] = {number: recorded for number in range(len(lmm.decoder.layers))}  # type: ignore[arg-type]
    with changed_layers(lmm, changes):
        lmm.decoder(inputs_embeds=embeddings, use_cache=False, **inputs)
    return found


@torch.no_grad()
def keys_and_values_of(lmm: LMM, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [L, heads, d] of every layer for rows [L, D], in float32 on the CPU.

    Each row stands alone behind the token that sequences begin with, and at that token's position: there a rotary
    embedding changes nothing, so the keys have none. Under ZeRO-3 all ranks call this.
    """
    embeddings, inputs = _sequence(lmm, rows[:, None])
    cache = DynamicCache()
    positions = torch.zeros(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
    inputs |= {"position_ids": lmm.family.position_ids(positions), "past_key_values": cache}
    lmm.decoder(inputs_embeds=embeddings, use_cache=True, **inputs)
    return [(layer.keys[:, :, -1].float().cpu(), layer.values[:, :, -1].float().cpu()) for layer in cache.layers]


def _sequence(lmm: LMM, rows: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Embeddings [B, 1 + L, D] of the first token and the rows [B, L, D], and the decoder's further arguments."""
    device = lmm.model.device
    first = lmm.tokenizer.bos_token_id
    first = lmm.tokenizer.eos_token_id if first is None else first
    begin = lmm.vocabulary_rows(torch.tensor([first])).expand(len(rows), 1, -1)
    embeddings = torch.cat([begin, rows], dim=1).to(device, lmm.dtype)
    attention = torch.ones(embeddings.shape[:2], dtype=torch.long, device=device)
    images = {name: value.to(device) for name, value in lmm.conversation.blank.items()}
    return embeddings, lmm.decoder_inputs(embeddings, attention, torch.zeros_like(attention).bool(), images)
