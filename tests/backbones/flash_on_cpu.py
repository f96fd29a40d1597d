"""FlashAttention 2 on a CPU: transformers' own calls of it, with the package's two functions in plain torch.

They keep what the kernel keeps for the backward pass: queries, keys, values, outputs, and a sum per row and head.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import modeling_flash_attention_utils as flash

from pipeline.backbones.lmm import LMM

NAME = "flash_attention_2"


class Calls(list[str]):
    """Which function was called with what, in order: dense, or lengths."""


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Outputs [n, heads, d] of n queries to m keys, and log-sum-exps; the last query stands at the last key."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = torch.einsum("nhd,mhd->hnm", query.float(), key.float()) * scale
    if causal:
        seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril(len(key) - len(query))
        scores = scores.masked_fill(~seen, -torch.inf)
    output = torch.einsum("hnm,mhd->nhd", scores.softmax(-1).nan_to_num(), value.float())
    return output.to(query.dtype), scores.logsumexp(-1)


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, ends: Any, scale: float, causal: bool) -> Tensor:
        parts = [attend(query[a:b], key[c:d], value[c:d], scale, causal) for a, b, c, d in ends]
        output = torch.cat([part for part, _ in parts])
        ctx.ends, ctx.scale, ctx.causal = ends, scale, causal
        ctx.save_for_backward(query, key, value, output, torch.cat([sums for _, sums in parts], 1))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [value.detach().requires_grad_() for value in ctx.saved_tensors[:3]]
        query, key, value = inputs
        with torch.enable_grad():
            parts = [attend(query[a:b], key[c:d], value[c:d], ctx.scale, ctx.causal)[0] for a, b, c, d in ctx.ends]
            return (*torch.autograd.grad(torch.cat(parts), inputs, gradients[0]), None, None, None)


def use_flash_on_cpu(lmm: LMM | None, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Let a model's decoder attend by FlashAttention 2 while the test runs; returns the calls of the kernel."""
    calls = Calls()

    def varlen(  # noqa: PLR0913 - transformers passes on what the package names
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        deterministic: bool = False,
    ) -> Tensor:
        assert q.dim() == 3 and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert dropout_p == 0 and softmax_scale is not None and window_size == (-1, -1) and softcap == 0
        queries, keys = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        assert (queries[-1], keys[-1]) == (len(q), len(k)) and len(queries) == len(keys)
        assert max_seqlen_q == max(cu_seqlens_q.diff().tolist()) and max_seqlen_k == max(cu_seqlens_k.diff().tolist())
        calls.append("lengths")
        ends = list(zip(queries, queries[1:], keys, keys[1:], strict=False))
        return _Kernel.apply(q, k, v, ends, softmax_scale, causal)

    def dense(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool, **rest: Any) -> Tensor:
        assert q.dim() == 4 and not rest.get("dropout_p")
        calls.append("dense")
        (n, m), rows = (q.shape[1], k.shape[1]), range(len(q))
        ends = [(row * n, row * n + n, row * m, row * m + m) for row in rows]
        flat = [value.flatten(0, 1) for value in (q, k, v)]
        return _Kernel.apply(*flat, ends, softmax_scale, causal).view(q.shape)

    functions = (dense, varlen, None, flash._pad_input, flash._unpad_input)
    monkeypatch.setattr(flash, "_lazy_imports", lambda *_, **__: functions)
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    if lmm is not None:
        monkeypatch.setattr(lmm.decoder.config, "_attn_implementation", NAME)
    return calls
