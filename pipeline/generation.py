"""Greedy answers of a model on this rank to questions with their prompt sets, in batches of similar length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from pipeline.backbones.lmm import LMM
from pipeline.backbones.lmm_beginning import generate_behind
from pipeline.data.collate import Batch, Examples, collate_prompts
from pipeline.progress import counted
from pipeline.prompts.embedding import embed_with_sets
from pipeline.prompts.insertion import gather_sets, insert_prompts
from pipeline.prompts.routing import NO_SET
from pipeline.prompts.two_passes import cut_behind_images


@torch.no_grad()
def generate_answers(
    lmm: LMM,
    examples: Examples,
    indices: Sequence[int],
    selected: Tensor,
    sets: Tensor,
    max_new_tokens: int,
    batch: int,
    insertion: str = "after_bos",
    bar: str | None = None,
    go_on: Callable[[], bool] = lambda: True,
) -> dict[int, str]:
    """Greedy answers of the samples `indices`, by index; `selected` [N, m] numbers of the sets [T, L, D] for all
    samples, which stand where `insertion` says (see `insertion_place`).

    Samples of similar length are generated together. How samples are batched changes the order in which numbers are
    added and nothing else: float32 answers were always the same, in bfloat16 on a GPU close calls may differ.
    `bar` names the bar that a terminal shows. `go_on`
    is asked before every batch; the batches after its first no are left out.
    """
    device = lmm.model.device
    bank, selected = _used_sets(sets, selected, indices)
    bank = bank.to(device, lmm.dtype)
    lengths = {
        index: len(examples[index].prompt)
        + int((selected[index] != NO_SET).sum()) * (bank.shape[1] if len(bank) else 0)
        for index in indices
    }
    ordered = sorted(indices, key=lambda index: (-lengths[index], index))
    answers: dict[int, str] = {}
    for part in counted(_batches(examples, ordered, batch), len(ordered), bar):
        if not go_on():
            break
        inputs = collate_prompts(examples, part, selected).to(device)
        answer = generate_once if examples.sharing == "none" else _generate_behind
        generated = answer(lmm, inputs, bank, max_new_tokens, insertion)
        for index, tokens in zip(part, generated, strict=True):
            answers[index] = examples.conversation.decode(tokens)
    return answers


def _used_sets(sets: Tensor, selected: Tensor, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Of the sets [T, L, D] those that the samples `indices` get, and their numbers among these for all samples.

    So a pool of a thousand sets takes no more of the device's memory than one of eight.
    """
    used = selected[list(indices)].unique()
    used = used[used != NO_SET]
    numbers = torch.full((len(sets) + 1,), NO_SET, dtype=torch.long)  # the last is that of NO_SET itself
    numbers[used] = torch.arange(len(used))
    return sets[used.to(sets.device)], numbers[selected]


def generate_once(lmm: LMM, inputs: Batch, bank: Tensor, max_new_tokens: int, insertion: str) -> list[list[int]]:
    """Answers [B] to a batch, each sample computed from its first token on."""
    embeddings, attention, places = embed_with_sets(lmm, inputs, bank, insertion)
    return lmm.generate(embeddings, attention, max_new_tokens, places, inputs.images)


def _generate_behind(lmm: LMM, inputs: Batch, bank: Tensor, max_new_tokens: int, insertion: str) -> list[list[int]]:
    """Answers [B] to a batch, in which what samples begin with in common is computed once."""
    cut = cut_behind_images(lmm, inputs, bank, insertion)
    embeddings, attention = cut.embeddings, cut.attention
    if insertion == "after_image" and inputs.selected.shape[1] and len(bank):
        vectors, valid = gather_sets(bank, inputs.selected)
        foremost = torch.zeros_like(cut.groups)
        embeddings, attention, _ = insert_prompts(embeddings, attention, vectors, valid, place=foremost)
        used = int(attention.sum(1).max())
        embeddings, attention = embeddings[:, :used], attention[:, :used]
    return generate_behind(lmm, cut.beginning, cut.groups, embeddings, attention, max_new_tokens)


def _batches(examples: Examples, ordered: list[int], batch: int) -> Iterator[list[int]]:
    """Batches of so many samples in this order, except that those which share an image follow its first."""
    if examples.sharing != "none":
        first: dict[bytes, int] = {}
        for place, index in enumerate(ordered):
            first.setdefault(examples[index].picture, place)
        ordered = sorted(ordered, key=lambda index: first[examples[index].picture])
    for start in range(0, len(ordered), batch):
        yield ordered[start : start + batch]
