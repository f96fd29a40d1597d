"""Collates tokenised samples of a stage or a test set into batches of tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pipeline.data.conversation import KEPT, Conversation
from pipeline.data.example import Example
from pipeline.data.example_cache import ExampleCache
from pipeline.data.kept_features import KeptFeatures
from pipeline.data.keys import Keys
from pipeline.data.order import Order, rank_slice
from pipeline.data.selection import Selection, as_selection
from pipeline.data.stage_data import StageData

__all__ = ["Batch", "Examples", "Keys", "MicroBatches", "StageData", "collate", "collate_prompts"]


@dataclass
class Batch:
    """The samples of one forward pass on one rank; padded on the right for training, on the left for generation."""

    input_ids: Tensor  # [B, N]
    attention: Tensor  # [B, N]
    labels: Tensor  # [B, N], -100 where no token is learned
    images: dict[str, Tensor]  # inputs such as pixel_values [crops, 3, H, W], images concatenated; a blank one for none
    has_image: Tensor  # [B] bool
    weights: Tensor  # [B] float32, 0 for a duplicate that fills up the last batch
    selected: Tensor  # [B, m] numbers of earlier sets, NO_SET: none
    image_key: Tensor  # [B, K] float32
    text_key: Tensor  # [B, K] float32
    ids: list[str]
    selected_weights: Tensor | None = None  # [B, m] float32 weights of these sets; None: all are 1
    # [B] in training: where the samples stand in the stage's order over all ranks, of which random draws are a function
    places: Tensor | None = None
    # Where samples share prefixes, `images` are those of the G prefixes.
    groups: Tensor | None = None  # [B] number of each sample's prefix
    leaders: Tensor | None = None  # [G] the first sample with each prefix

    def to(self, device: torch.device) -> Batch:
        return self._each(lambda value: value.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in pinned memory, from which a GPU copies while it computes; torch's loader calls this."""
        return self._each(Tensor.pin_memory)

    def tensors(self) -> list[Tensor]:
        """All tensors of the batch."""
        found: list[Tensor] = []
        self._each(lambda value: found.append(value) or value)  # type: ignore[func-returns-value]
        return found

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with every tensor changed."""
        changed: dict[str, Any] = {
            field.name: change(value)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        changed["images"] = {name: change(value) for name, value in self.images.items()}
        return dataclasses.replace(self, **changed)

    @property
    def selection(self) -> Selection:
        """The earlier modules of each sample, with their weights."""
        return Selection(self.selected, self.selected_weights, self.places)

    def counts(self) -> tuple[float, float]:
        """Numbers of answer tokens and samples, without duplicates."""
        tokens = ((self.labels[:, 1:] != -100).sum(1) * self.weights).sum()
        return float(tokens), float(self.weights.sum())


class Examples:
    """Tokenised samples of a `StageData`, cached where all of them together fit into `ExampleCache`."""

    def __init__(
        self,
        data: StageData,
        conversation: Conversation,
        sharing: Literal["none", "image", "sets"] = "none",
        ready: Sequence[Example] | None = None,
        kept: KeptFeatures | None = None,
        once: bool = False,
        answered: bool = True,
    ) -> None:
        """Wrap the samples of `data`.

        Args:
            data: the samples and their keys.
            conversation: tokenises them.
            sharing: which samples of a batch share a prefix (see `Batch.groups`): "none"; "image": those with the same
                tokens up to and with their image; "sets": of these, those with the same prompt sets.
            ready: all samples, where they are tokenised already.
            kept: stored features of the vision tower; images are then neither decoded nor encoded.
            once: each sample is read only once, so none is cached.
            answered: False leaves the answers out of the examples, for generation.
        """
        self.data = data
        self._answered = answered
        self.ready = ready
        self.conversation = conversation
        self.sharing = sharing
        self.kept = kept
        self._cache = ExampleCache(0 if once else len(data))

    @property
    def blank(self) -> dict[str, Tensor]:
        """The inputs of a blank image, for a batch without an image."""
        return self.conversation.blank if self.kept is None else {KEPT: self.kept.blank}

    def __getitem__(self, index: int) -> Example:
        if self.ready is not None:
            return self.ready[index]
        example = self._cache.get(index)
        if example is None:
            sample = self.data[index]
            if not self._answered:  # nor do answers count towards the longest sequence
                sample = dataclasses.replace(sample, answer="", meta={})
            example = self.conversation.example(sample, None if self.kept is None else self.kept[index])
            self._cache.put(index, example)
        return example


def collate(
    examples: Examples,
    indices: Sequence[int],
    weights: Sequence[float],
    selected: Selection | Tensor,
    with_answer: bool = True,
) -> Batch:
    """Make the batch of the samples `indices`.

    Args:
        examples: samples of the stage.
        indices: the samples of the batch.
        weights: their weights, 0 for duplicates.
        selected: the earlier modules of every sample of the stage.
        with_answer: rows with answers are padded on the right, rows without (for generation) on the left.
    """
    return collated(examples, [examples[int(index)] for index in indices], indices, weights, selected, with_answer)


def collated(
    examples: Examples,
    chosen: Sequence[Example],
    indices: Sequence[int],
    weights: Sequence[float],
    selected: Selection | Tensor,
    with_answer: bool = True,
) -> Batch:
    """`collate` for examples that exist already."""
    conversation, keys = examples.conversation, examples.data.keys
    pad = conversation.tokenizer.pad_token_id or 0
    rows = [example.prompt + (example.answer if with_answer else []) for example in chosen]
    width = max(map(len, rows))
    input_ids = torch.full((len(rows), width), pad, dtype=torch.long)
    attention = torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full((len(rows), width), -100, dtype=torch.long)
    for place, (row, example) in enumerate(zip(rows, chosen, strict=True)):
        start = 0 if with_answer else width - len(row)
        input_ids[place, start : start + len(row)] = torch.tensor(row)
        attention[place, start : start + len(row)] = 1
        if with_answer:
            labels[place, len(example.prompt) : len(row)] = torch.tensor(example.labels)
    index = torch.as_tensor(np.asarray(indices), dtype=torch.long)
    selection = as_selection(selected)
    selection = selection.rows(index) if len(selection) else Selection.none(len(rows))
    groups = None if examples.sharing == "none" else _groups(examples, chosen, selection)
    leaders = range(len(chosen)) if groups is None else [groups.index(group) for group in range(max(groups) + 1)]
    pictured = [chosen[place].images for place in leaders]
    # Every batch has an image, so that all ranks run the vision tower (docs/design.md 3.2).
    images = [picture for picture in pictured if picture is not None] or [examples.blank]
    return Batch(
        input_ids=input_ids,
        attention=attention,
        labels=labels,
        images={name: torch.cat([image[name] for image in images]) for name in images[0]},
        has_image=torch.tensor([example.images is not None for example in chosen]),
        weights=torch.as_tensor(np.asarray(weights), dtype=torch.float32),
        selected=selection.numbers,
        selected_weights=selection.weights,
        image_key=keys.image[index].float(),
        text_key=keys.text[index].float(),
        ids=[example.id for example in chosen],
        groups=None if groups is None else torch.tensor(groups),
        leaders=None if groups is None else torch.tensor(leaders),
    )


def _groups(examples: Examples, chosen: Sequence[Example], selection: Selection) -> list[int]:
    """The number of each sample's prefix: the tokens up to the end of its image, the image, and shared sets."""
    image, numbers = examples.conversation.image_number, dict[Any, int]()
    groups = []
    for example, sets in zip(chosen, selection.listed(), strict=True):
        prompt = example.prompt
        end = len(prompt) - prompt[::-1].index(image) if example.picture and image in prompt else 1
        beginning = (example.picture, tuple(prompt[:end]), tuple(sets) if examples.sharing == "sets" else ())
        groups.append(numbers.setdefault(beginning, len(numbers)))
    return groups


def collate_prompts(examples: Examples, indices: Sequence[int], selected: Selection | Tensor) -> Batch:
    """A batch for generation: prompts only, padded on the left."""
    return collate(examples, indices, [1.0] * len(indices), selected, with_answer=False)


class MicroBatches(Dataset[Batch]):
    """The micro-batches of one rank in the order of a stage; item i belongs to step i // accumulation."""

    def __init__(
        self,
        examples: Examples,
        order: Order,
        selected: Selection | Tensor,
        steps: int,
        accumulation: int,
        rank: int,
        world: int,
    ) -> None:
        self.examples, self.order, self.selection = examples, order, as_selection(selected)
        self.steps, self.accumulation, self.rank, self.world = steps, accumulation, rank, world

    def __len__(self) -> int:
        return self.steps * self.accumulation

    def __getitem__(self, item: int) -> Batch:
        step, micro = divmod(item, self.accumulation)
        epoch, batch = divmod(step, self.order.batches_per_epoch)
        indices, weights = self.order.batch(epoch, batch)
        places = np.arange(step * len(indices), (step + 1) * len(indices))
        indices, weights = rank_slice(indices, self.rank, self.world), rank_slice(weights, self.rank, self.world)
        places = rank_slice(places, self.rank, self.world)
        size = len(indices) // self.accumulation
        part = slice(micro * size, (micro + 1) * size)
        found = collate(self.examples, indices[part].tolist(), weights[part].tolist(), self.selection)
        return dataclasses.replace(found, places=torch.from_numpy(places[part].copy()))

    def samples_of(self, steps: Iterable[int]) -> list[int]:
        """The samples of the global batches of these steps, over all ranks."""
        found: list[int] = []
        for step in steps:
            indices, weights = self.order.batch(*divmod(step, self.order.batches_per_epoch))
            found += indices[weights > 0].tolist()
        return found


def counts_of_step(batches: Sequence[Batch]) -> Any:
    """Numbers [2] of answer tokens and samples of this rank in one optimizer step."""
    return torch.tensor([batch.counts() for batch in batches], dtype=torch.float64).sum(0)
