"""Insert prompts into the towers of a Hugging Face model by hooks, which are removed after one forward pass.

The model's own code runs unchanged, with any attention implementation, precision and sharding that it supports. Image
prompts are appended to the sequence before CLIP's first layer norm and get no position embedding. Text prompts replace
given rows: in the first block token embeddings, to which position embeddings are then added; in later blocks hidden
states (docs/design.md 5.3, 5.4). Prompts that are keys and values of single blocks are in `extra_keys`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.clip.towers.extra_keys import Mixed, extra_keys
from pipeline.clip.towers.schedule import TowerSchedule

# Block -> new prompts [n, D], or [R, n, D] for each of R sequences; or the options of a search.
Additions = Mapping[int, Tensor | Mixed]


@contextmanager
def image_prompts(tower: nn.Module, schedule: TowerSchedule, added: Additions, pooled_tokens: bool) -> Iterator[None]:
    """Within this context a vision tower gets image prompts.

    Args:
        tower: a CLIP or SigLIP vision model.
        schedule: the number of prompts removed and added before each block.
        added: prompts by block.
        pooled_tokens: the tower pools over all tokens (SigLIP). Its prompts are then removed after the last block,
            because the pooling was trained on patches alone.
    """
    layers = _layers(tower)
    if schedule.kv:
        with extra_keys(layers, added, front=False):
            yield
        return
    added = _in_the_sequence(added)
    with ExitStack() as stack:
        if 0 in added:
            stack.enter_context(_changed_output(_part(tower, "embeddings"), lambda x: _append(x, added[0])))
        for block in range(1, len(schedule.ops)):
            remove, fresh = schedule.ops[block].remove, added.get(block)
            if remove or fresh is not None:
                stack.enter_context(_changed_input(layers[block], _Tail(remove, fresh)))
        if pooled_tokens and schedule.present[-1]:
            stack.enter_context(_changed_output(layers[-1], _Tail(schedule.present[-1], None)))
        yield


@contextmanager
def text_prompts(tower: nn.Module, schedule: TowerSchedule, added: Additions, rows: Tensor) -> Iterator[None]:
    """Within this context a text tower gets text prompts.

    Args:
        tower: a CLIP or SigLIP text model.
        schedule: the number of prompts replaced before each block; a block that replaces r takes the last r rows.
        added: prompts by block.
        rows: positions [R, n] of the prompts in each sequence.
    """
    layers = _layers(tower)
    if schedule.kv:
        # In front of the start token, which every token sees: under a causal mask all tokens then see the prompts.
        with extra_keys(layers, added, front=True):
            yield
        return
    with ExitStack() as stack:
        for block, fresh in _in_the_sequence(added).items():
            where = rows[:, rows.shape[1] - schedule.ops[block].add :]
            place = _Place(where, fresh)
            if block == 0:
                table = _part(_part(tower, "embeddings"), "token_embedding")
                stack.enter_context(_changed_output(table, place))
            else:
                stack.enter_context(_changed_input(layers[block], place))
        yield


@contextmanager
def averaged_embeddings(tower: nn.Module, rows: Tensor) -> Iterator[None]:
    """Within this context the token embeddings of a text tower are `rows` [R, T, D], whatever its token ids."""
    table = _part(_part(tower, "embeddings"), "token_embedding")
    with _changed_output(table, lambda x: rows.to(x.dtype)):
        yield


def _in_the_sequence(added: Additions) -> dict[int, Tensor]:
    assert not any(isinstance(prompt, Mixed) for prompt in added.values()), "a mixture has no place in the sequence"
    return {block: prompt for block, prompt in added.items() if isinstance(prompt, Tensor)}


class _Tail:
    """Remove the last `remove` tokens of x [B, T, D], then append `fresh`."""

    def __init__(self, remove: int, fresh: Tensor | None) -> None:
        self.remove, self.fresh = remove, fresh

    def __call__(self, x: Tensor) -> Tensor:
        kept = x[:, : x.shape[1] - self.remove]
        return kept if self.fresh is None else _append(kept, self.fresh)


class _Place:
    """Replace the rows `rows` [R, n] of x [R, T, D] by `fresh`."""

    def __init__(self, rows: Tensor, fresh: Tensor) -> None:
        self.rows, self.fresh = rows, fresh

    def __call__(self, x: Tensor) -> Tensor:
        index = self.rows.to(x.device)[..., None].expand(-1, -1, x.shape[-1])
        return x.scatter(1, index, _sequences(self.fresh, x))


def _append(x: Tensor, fresh: Tensor) -> Tensor:
    return torch.cat([x, _sequences(fresh, x)], dim=1)


def _sequences(prompt: Tensor, x: Tensor) -> Tensor:
    """The prompt [n, D] or [R, n, D] in the precision of x, expanded to every sequence of x."""
    return prompt.to(dtype=x.dtype).expand(len(x), -1, -1)


def _part(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(name)


def _layers(tower: nn.Module) -> nn.ModuleList:
    layers = tower.get_submodule("encoder.layers")
    assert isinstance(layers, nn.ModuleList)
    return layers


@contextmanager
def _changed_output(module: nn.Module, change: Any) -> Iterator[None]:
    handle = module.register_forward_hook(lambda _module, _inputs, output: change(output))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _changed_input(module: nn.Module, change: Any) -> Iterator[None]:
    def hook(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        if inputs:
            return (change(inputs[0]), *inputs[1:]), named
        return inputs, {**named, "hidden_states": change(named["hidden_states"])}

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
