"""A pool of prompts with keys, of which each sample gets those whose keys its query is nearest to (L2P)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipeline.config.base import Section
from pipeline.prompts.insertion import gather_sets
from pipeline.prompts.parts.base import Entry, Part, shape_of
from pipeline.prompts.parts.input_rows import usable_rows
from pipeline.prompts.queries import LearnedKeys, cosines, query_of

if TYPE_CHECKING:
    from pipeline.backbones.lmm import LMM
    from pipeline.data.collate import Batch
    from pipeline.prompts.parts.shapes import DecoderShape

PROMPTS, KEYS = "pool.prompts", "pool.keys"


class PoolOptions(Section):
    """Size of the pool, and how many of its prompts a sample gets."""

    pool_size: int = Field(10, ge=1, description="M, prompts in the pool")
    pool_length: int = Field(5, ge=1, description="rows of each prompt")
    chosen: int = Field(5, ge=1, description="N, prompts that a sample gets, those of the nearest keys")
    batch_vote: bool = Field(
        False,
        description="true: all samples of a batch get the prompts that most of them chose, in training and at "
        "inference, as two public ports do; answers then depend on how questions are batched",
    )
    init: Literal["vocab_rows", "normal", "previous"] = Field("vocab_rows", description="where the prompts start")

    @model_validator(mode="after")
    def _enough(self) -> PoolOptions:
        if self.chosen > self.pool_size:
            raise ValueError(f"chosen {self.chosen} of a pool of {self.pool_size}; expected at most pool_size")
        return self


@dataclass(frozen=True)
class Choosing:
    """How prompts are chosen for the samples of a batch."""

    chosen: int
    batch_vote: bool

    def __call__(self, similarity: Tensor) -> Tensor:
        """Numbers [B, N] of the prompts, nearest first, by cosines [B, M]."""
        numbers = similarity.topk(self.chosen, dim=1).indices
        if not self.batch_vote:
            return numbers
        votes = torch.bincount(numbers.flatten(), minlength=similarity.shape[1])
        most = votes.sort(descending=True, stable=True).indices[: self.chosen]
        return most.expand(len(similarity), -1)


def queries_of(batch: Batch) -> Tensor:
    """The queries [B, 2 K] of a batch."""
    return query_of(batch.image_key, batch.text_key, batch.has_image)


class PoolEntry(Entry):
    """Prompts of the selected pool stand where `insertion` says, chosen for each sample by its query."""

    def __init__(self, insertion: str, length: int, choosing: Choosing) -> None:
        self.insertion, self.rows_each, self.choosing = insertion, length, choosing

    def length(self, tensors: Mapping[str, Tensor]) -> int:
        return self.rows_each * self.choosing.chosen

    def rows(self, tensors: Mapping[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor] | None:
        prompts = tensors.get(PROMPTS)  # [T, M, L, D]
        if prompts is None or not len(prompts) or not batch.selected.shape[1]:
            return None
        pool = batch.selected[:, 0]  # one pool for a sample: that of the last stage
        similarity = cosines(queries_of(batch), tensors[KEYS][pool.clamp(min=0)])
        numbers = self.choosing(similarity) + pool.clamp(min=0)[:, None] * prompts.shape[1]
        return gather_sets(prompts.flatten(0, 1), numbers.masked_fill(pool[:, None] < 0, -1))


class PromptPoolPart(Part):
    """M prompts [L, D] with a key [2 K] each, which every stage goes on training.

    Prompts start from rows of the vocabulary: the published uniform values are fifty times as large as an LMM's.
    """

    Options = PoolOptions
    sized_by = "pool_length"

    def __init__(self, lmm: LMM, options: PoolOptions, insertion: str, key_width: int, carried: bool = True) -> None:
        super().__init__()
        if insertion == "after_image":
            lmm.require_two_passes()
        self.insertion, self.init, self.carried = insertion, options.init, carried
        self.choosing = Choosing(options.chosen, options.batch_vote)
        shape = options.pool_size, options.pool_length, lmm.width
        self.prompts = nn.Parameter(torch.zeros(shape, dtype=lmm.dtype))
        self.keys = LearnedKeys(options.pool_size, key_width, lmm.dtype)

    @classmethod
    def keyed(cls, lmm: LMM, method: Any, key_width: int) -> PromptPoolPart:
        """That of a method's options."""
        return cls(lmm, cls.options(method), method.insertion, key_width, method.carries_prompt)

    @classmethod
    def entry(cls, method: Any) -> Entry:
        """How finished pools of a method enter."""
        options = cls.options(method)
        return PoolEntry(method.insertion, options.pool_length, Choosing(options.chosen, options.batch_vote))

    @classmethod
    def keeps(cls, name: str) -> bool:
        return name in (PROMPTS, KEYS)

    @classmethod
    def length(cls, method: Any) -> int:
        options = cls.options(method)
        return int(options.pool_length * options.chosen)

    @classmethod
    def sizes(cls, method: Any, shape: DecoderShape) -> list[int]:
        options = cls.options(method)
        return [options.pool_size * options.pool_length * shape.width, options.pool_size * 2 * shape.key_width]

    def trainables(self) -> dict[str, nn.Parameter]:
        return {PROMPTS: self.prompts, KEYS: self.keys.keys}

    def start(self, lmm: LMM, generator: torch.Generator, previous: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if (self.carried or self.init == "previous") and previous:
            return {name: previous[name].clone() for name in (PROMPTS, KEYS)}
        count, length, width = shape_of(self.prompts)
        if self.init == "normal":
            prompts = torch.randn(count, length, width, generator=generator) * 0.02
        else:
            words = usable_rows(lmm)
            prompts = lmm.vocabulary_rows(words[torch.randint(len(words), (count * length,), generator=generator)])
        keys = self.keys.start(generator, shape_of(self.keys.keys))
        return {PROMPTS: prompts.reshape(count, length, width), KEYS: keys}

    def forward(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Those prompts [B, N * L, D] of the pool and their validity, by numbers [B, N]."""
        return gather_sets(self.prompts, numbers)

    def rows(self, bank: Mapping[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor] | None:
        found: tuple[Tensor, Tensor] = self(self.choosing(self.keys(queries_of(batch))))
        return found

    def key_distances(self, batch: Batch) -> Tensor:
        similarity = self.keys(queries_of(batch))
        return (1.0 - similarity.gather(1, self.choosing(similarity))).sum(1)
