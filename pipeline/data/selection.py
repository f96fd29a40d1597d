"""The selection: the modules (prompt sets, low-rank updates) that each sample gets, and their weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

NO_SET = -1


@dataclass(frozen=True)
class Selection:
    """The modules of N samples: one row of module numbers per sample, the least similar one first.

    That is the order of insertion of prompt sets, so the most similar one is next to the text. Rows are filled up with
    `NO_SET` on the right. With `weights` None every selected module has the weight 1, as in ModalPrompt. Rows hold only
    selected modules, not all T of the pool, because pools may have a thousand tasks.
    """

    numbers: Tensor  # [N, m] long
    weights: Tensor | None = None  # [N, m] float32; those of NO_SET are 0
    # [N] of a batch in training (see `Batch.places`); [N, 2] with the number of the token, where rows are tokens
    places: Tensor | None = None

    @classmethod
    def none(cls, samples: int) -> Selection:
        """No module for any of `samples` samples."""
        return cls(torch.full((samples, 0), NO_SET, dtype=torch.long))

    @classmethod
    def same(cls, samples: int, numbers: Sequence[int]) -> Selection:
        """The same modules for each of `samples` samples."""
        return cls(torch.tensor(list(numbers), dtype=torch.long).repeat(samples, 1))

    @classmethod
    def joined(cls, parts: Sequence[Selection]) -> Selection:
        """The concatenated selections of several lists of samples, filled up to the width of the widest."""
        width = max(part.width for part in parts)
        gaps = [(0, width - part.width) for part in parts]
        numbers = torch.cat([pad(part.numbers, gap, value=NO_SET) for part, gap in zip(parts, gaps, strict=True)])
        if all(part.weights is None for part in parts):
            return cls(numbers)
        return cls(numbers, torch.cat([pad(part.full_weights(), gap) for part, gap in zip(parts, gaps, strict=True)]))

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def width(self) -> int:
        """m, the most modules of one sample."""
        return self.numbers.shape[1]

    def full_weights(self) -> Tensor:
        """The weights [N, m] as a tensor: 1 where `weights` is None, 0 at NO_SET."""
        given = torch.ones(self.numbers.shape) if self.weights is None else self.weights.float()
        return given.to(self.numbers.device).masked_fill(self.numbers == NO_SET, 0.0)

    def rows(self, index: Tensor) -> Selection:
        """The selections of the samples at the indices [B]."""
        weights, places = (None if one is None else one[index] for one in (self.weights, self.places))
        return Selection(self.numbers[index], weights, places)

    def tokens(self, samples: Tensor, numbers: Tensor) -> Selection:
        """The selections of tokens [n], given whose they are [n] and their numbers in these samples' answers [n]."""
        found = self.rows(samples)
        return found if found.places is None else replace(found, places=torch.stack([found.places, numbers], dim=1))

    def replaced(self, index: Tensor, rows: Selection) -> Selection:
        """The same selections, but `rows` for the samples at the indices [B]."""
        order = torch.arange(len(self))
        order[index] = len(self) + torch.arange(len(rows))
        return Selection.joined([self, rows]).rows(order)

    def differs(self, other: Selection) -> Tensor:
        """Whether a sample [N] gets other modules, in another order or with other weights in `other`."""
        both = Selection.joined([self, other])
        (mine, its), (my_weights, its_weights) = (
            values.split(len(self)) if len(self) else (values, values) for values in (both.numbers, both.full_weights())
        )
        return ((mine != its) | (my_weights != its_weights)).any(1)

    def renumbered(self, numbers: Tensor) -> Selection:
        """The same modules with other numbers [N, m], as for a pool that is reduced to the used modules."""
        return replace(self, numbers=numbers)

    def without(self, samples: Tensor) -> Selection:
        """The selection without modules for the samples whose flag [N] is set."""
        hidden = samples.bool().to(self.numbers.device)[:, None]
        weights = None if self.weights is None else self.weights.masked_fill(hidden, 0.0)
        return Selection(self.numbers.masked_fill(hidden, NO_SET), weights)

    def to(self, device: torch.device) -> Selection:
        weights = None if self.weights is None else self.weights.to(device)
        return Selection(self.numbers.to(device), weights)

    def listed(self) -> list[list[tuple[int, float]]]:
        """`chosen` of every sample."""
        rows = self.numbers.tolist()
        weights = [[1.0] * self.width] * len(rows) if self.weights is None else self.weights.tolist()
        pairs = (zip(numbers, given, strict=True) for numbers, given in zip(rows, weights, strict=True))
        return [[pair for pair in row if pair[0] != NO_SET] for row in pairs]

    def chosen(self, sample: int) -> list[tuple[int, float]]:
        """One sample's modules with their weights, in order, without NO_SET."""
        return self.rows(torch.tensor([sample], device=self.numbers.device)).listed()[0]


def as_selection(selected: Selection | Tensor) -> Selection:
    """A Selection; a tensor of numbers [N, m] becomes one without weights."""
    return selected if isinstance(selected, Selection) else Selection(selected)


def without_gaps(numbers: Tensor) -> Tensor:
    """Rows [N, m] with NO_SET moved to the right; the order of the others is kept."""
    order = (numbers == NO_SET).to(torch.int8).sort(dim=1, stable=True).indices
    return torch.gather(numbers, 1, order)
