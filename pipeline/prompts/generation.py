"""Greedy answers of a model on this rank to questions with their prompt sets, in batches of similar length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pipeline.backbones.decoding import GreedyDecoder, Prompts, Row, generate
from pipeline.backbones.lmm import LMM
from pipeline.backbones.static_decoding import StaticDecoder
from pipeline.backbones.weigh import Weigh
from pipeline.console.progress import counted
from pipeline.data.collate import Batch, Examples, collated
from pipeline.data.example import Example
from pipeline.data.grouped_order import image_groups
from pipeline.data.loader import loaded
from pipeline.data.prompt_lengths import prompt_lengths
from pipeline.data.selection import NO_SET, Selection, as_selection
from pipeline.prompts.embedding import embed_with_modules
from pipeline.prompts.insertion import insert_prompts, row_numbers
from pipeline.prompts.parts.base import Entry
from pipeline.prompts.parts.input_rows import PROMPT, RowsEntry
from pipeline.prompts.two_passes import cut_behind_images
from pipeline.training.operations import OperationCount, counting

WAITING_BYTES = 128 << 20  # of samples that loader processes have made and that wait for their batch


@dataclass(frozen=True)
class Conditions:
    """What goes on beside generation.

    `workers` loader processes make the samples that come next; 0: this process makes each batch before it is answered.
    `bar` names the bar that a terminal shows. `go_on` is asked before every batch; the batches after its first no are
    left out. `progress` is called for every sample that was made and every batch that was answered. The operations of
    the first batch are added to the `count`.
    """

    workers: int = 0
    bar: str | None = None
    go_on: Callable[[], bool] = lambda: True
    progress: Callable[[], None] = lambda: None
    count: OperationCount | None = None


PLAIN = Conditions()


@dataclass(frozen=True)
class Modules:
    """What the samples get of what was learned, and how it enters the frozen model."""

    tensors: Mapping[str, Tensor]  # [T, ...] by name
    selected: Selection | Tensor  # numbers of the modules, for all samples
    entry: Entry
    common: Mapping[str, Tensor] = field(default_factory=dict)  # what all modules have in common, by name
    # What changes the scores of the answers' tokens, for some of the samples by number; None: nothing.
    weighing: Callable[[Sequence[int]], Sequence[Weigh | None]] | None = None

    @property
    def length(self) -> int:
        """Columns that one module takes in the sequence."""
        return self.entry.length(self.tensors)


def prompt_sets(sets: Tensor, selected: Selection | Tensor, insertion: str = "after_bos") -> Modules:
    """Prompt sets [T, L, D] that stand where `insertion` says (see `insertion_place`)."""
    return Modules({PROMPT: sets}, selected, RowsEntry(insertion))


@dataclass(frozen=True)
class Decoding:
    """How answers are generated: at most so many tokens each, so many samples in one batch, and with which cache."""

    max_new_tokens: int
    batch: int
    static: bool = False  # with a cache of fixed size; see `pipeline.backbones.static_decoding`

    @property
    def decoder(self) -> type[GreedyDecoder[Row]]:
        """The class of decoders."""
        return StaticDecoder[Row] if self.static else GreedyDecoder[Row]


@torch.no_grad()
def generate_answers(
    lmm: LMM,
    examples: Examples,
    indices: Sequence[int],
    modules: Modules,
    decoding: Decoding,
    conditions: Conditions = PLAIN,
) -> dict[int, str]:
    """Greedy answers of the samples `indices`, by index.

    Samples of similar length are generated together. How samples are batched changes the order in which numbers are
    added and nothing else: float32 answers were always the same, in bfloat16 on a GPU close calls may differ. Each
    sample is decoded and tokenised once.

    Args:
        lmm: the frozen model on this rank's device.
        examples: all samples, tokenised as the model reads them.
        indices: the samples to answer.
        modules: those of all samples, not only of those to answer.
        decoding: length of the answers and size of the batches.
        conditions: loader processes, progress, and whether to go on before each batch.
    """
    device, batch = lmm.model.device, decoding.batch
    selection = as_selection(modules.selected)
    ordered = _ordered(examples, indices, selection.numbers, modules.length)
    used, numbers = _used(selection.numbers, indices)
    selection = selection.renumbered(numbers)
    tensors = {name: value[used.to(value.device)].to(device, lmm.dtype) for name, value in modules.tensors.items()}
    tensors |= {name: value.to(device, lmm.dtype) for name, value in modules.common.items()}
    answers, count = dict[int, str](), conditions.count
    made = _made(examples, ordered, batch, conditions.workers)
    parts = (ordered[start : start + batch] for start in range(0, len(ordered), batch))
    answer = generate_once if examples.sharing == "none" else _generate_after_prefix
    for part in counted(parts, len(ordered), conditions.bar):
        if not conditions.go_on():
            break
        chosen = []
        for _ in part:
            chosen.append(next(made))
            conditions.progress()
        inputs = collated(examples, chosen, part, [1.0] * len(part), selection, with_answer=False)
        if device.type == "cuda":
            inputs = inputs.pin_memory()
        inputs = inputs.to(device)
        given = Modules(tensors, inputs.selection, modules.entry)
        with counting(count):
            # A step that is replayed as a graph is not seen by the count.
            decoder = decoding.decoder if count is None else GreedyDecoder[Row]
            weigh = None if modules.weighing is None else modules.weighing(part)
            generated = answer(lmm, inputs, given, decoding.max_new_tokens, decoder, weigh)
        if count is not None:
            count.samples += len(part)
            count = None
        for index, tokens in zip(part, generated, strict=True):
            answers[index] = examples.conversation.decode(tokens)
        conditions.progress()
    return answers


def _made(examples: Examples, ordered: Sequence[int], batch: int, workers: int) -> Iterator[Example]:
    """The examples of these samples in this order, made ahead by loader processes where there are any."""
    if not workers or len(ordered) <= 1:
        yield from (examples[index] for index in ordered)
        return
    # The first is among the largest: so many of it may wait in shared memory, at most a batch.
    first = examples[ordered[0]]
    yield first
    waiting = max(workers, min(batch, WAITING_BYTES // max(first.nbytes, 1)))
    yield from loaded(examples, ordered[1:], workers, ahead=-(-waiting // workers))


def _ordered(examples: Examples, indices: Sequence[int], selected: Tensor, set_length: int) -> list[int]:
    """The samples from the longest prompt to the shortest; where samples share images, those that show the same one
    directly behind the longest of them."""
    chosen = torch.as_tensor(np.asarray(indices, dtype=np.int64))
    sets = (selected[chosen] != NO_SET).sum(1).numpy()
    lengths = prompt_lengths(examples, indices) + set_length * sets
    places = np.lexsort((chosen.numpy(), -lengths))
    ordered = [int(indices[place]) for place in places.tolist()]
    if examples.sharing == "none":
        return ordered
    groups = image_groups(examples.data.keys)
    first: dict[int, int] = {}
    for place, index in enumerate(ordered):
        first.setdefault(int(groups[index]), place)
    return sorted(ordered, key=lambda index: first[int(groups[index])])


def _used(selected: Tensor, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The numbers of the modules that the samples `indices` get, and those of all samples among these.

    So a pool of a thousand modules takes no more of the device's memory than one of eight.
    """
    used = selected[list(indices)].unique()
    used = used[used != NO_SET]
    numbers = torch.full((max(int(selected.max()) if selected.numel() else 0, 0) + 2,), NO_SET, dtype=torch.long)
    numbers[used] = torch.arange(len(used))
    return used, numbers[selected]  # the last of the numbers is that of NO_SET itself


def generate_once(
    lmm: LMM,
    inputs: Batch,
    modules: Modules,
    max_new_tokens: int,
    decoder: type[GreedyDecoder[Row]] | None = None,
    weigh: Sequence[Weigh | None] | None = None,
) -> list[list[int]]:
    """Answers [B] to a batch, each sample computed from its first token on."""
    entry, tensors = modules.entry, modules.tensors
    found = embed_with_modules(lmm, inputs, entry, tensors)
    prompts = Prompts(
        found.vectors,
        found.attention,
        found.places,
        inputs.images,
        selection=entry.chosen(tensors, inputs),
        inserted=found.inserted if entry.follows_rows else None,
    )
    return generate(lmm, prompts, max_new_tokens, attached=entry.on(lmm, tensors), decoder=decoder, weigh=weigh)


def _generate_after_prefix(
    lmm: LMM,
    inputs: Batch,
    modules: Modules,
    max_new_tokens: int,
    decoder: type[GreedyDecoder[Row]],
    weigh: Sequence[Weigh | None] | None = None,
) -> list[list[int]]:
    """Answers [B] to a batch, in which what samples begin with in common is computed once."""
    entry, insertion = modules.entry, modules.entry.insertion or "after_bos"
    rows = entry.rows(modules.tensors, inputs)
    cut = cut_behind_images(lmm, inputs, rows, insertion)
    embeddings, attention, inserted = cut.embeddings, cut.attention, None
    if insertion == "after_image" and rows is not None:
        foremost = torch.zeros_like(cut.groups)
        numbers = row_numbers(attention, rows[1], foremost)
        embeddings, attention, _ = insert_prompts(embeddings, attention, *rows, place=foremost)
        used = int(attention.sum(1).max())
        embeddings, attention = embeddings[:, :used], attention[:, :used]
        inserted = cut.behind_prefix(numbers[:, :used])
    prompts = Prompts(
        embeddings,
        attention,
        prefix=cut.prefix,
        groups=cut.groups,
        selection=entry.chosen(modules.tensors, inputs),
        inserted=inserted if entry.follows_rows else None,
    )
    attached = entry.on(lmm, modules.tensors)
    return generate(lmm, prompts, max_new_tokens, attached=attached, decoder=decoder, weigh=weigh)
