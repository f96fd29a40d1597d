"""Prompts of every layer computed anew: a loop over the frozen layers in which rows leave and enter a shorter sequence.

Of the project it takes the frozen model alone. One sample at a time, no padding, no hooks, and no hidden columns:
before each layer the removed rows are taken out of the sequence and the new ones put in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.backbones.lmm import LMM
from pipeline.backbones.prompt_schedule import Op

Rows = Sequence[Sequence[Tensor | None]]  # of each module, the new rows [a, D] of each layer


def hidden_of(lmm: LMM, tokens: Tensor, at: int, modules: Rows, ops: Sequence[Op]) -> Tensor:
    """Last hidden states [N, D] of the tokens.

    Args:
        lmm: the frozen model, a Llama with eager or sdpa attention.
        tokens: [N, D] embeddings of the words and the image.
        at: the token that the rows stand in front of.
        modules: their rows, in the order of insertion.
        ops: the schedule's.
    """
    decoder: Any = lmm.decoder
    counts, most = 0, 0
    for op in ops:
        counts += op.add - op.remove
        most = max(most, counts)
    columns = most * len(modules)  # the tokens behind the rows are shifted by as many positions in every layer
    before = list(enumerate(tokens[:at]))
    behind = [(number + columns, token) for number, token in enumerate(tokens) if number >= at]
    stacks: list[list[Tensor]] = [[] for _ in modules]
    for number, layer in enumerate(decoder.layers):
        if number < len(ops):
            for stack, module in zip(stacks, modules, strict=True):
                del stack[len(stack) - ops[number].remove :]
                fresh = module[number]
                if fresh is not None:
                    stack += list(fresh)
        rows = [(at + place * most + slot, row) for place, stack in enumerate(stacks) for slot, row in enumerate(stack)]
        sequence = [*before, *rows, *behind]
        positions = torch.tensor([[position for position, _ in sequence]])
        states = torch.stack([state for _, state in sequence])[None]
        causal = torch.ones(len(sequence), len(sequence), dtype=torch.bool).tril()[None, None]
        rotary = decoder.rotary_emb(states, positions)
        states = layer(states, attention_mask=causal, position_ids=positions, position_embeddings=rotary)[0]
        numbered = list(zip([position for position, _ in sequence], states, strict=True))
        before, behind = numbered[:at], numbered[at + len(rows) :]
        left = iter(states[at : at + len(rows)])
        stacks = [[next(left) for _ in stack] for stack in stacks]
    return decoder.norm(torch.stack([state for _, state in [*before, *behind]]))
