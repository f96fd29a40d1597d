"""What a method learns: prompts for the blocks of each tower, on a schedule, and the words around the class name."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.clip.methods.regulariser import Regulariser
from pipeline.clip.towers.schedule import PromptSchedule
from pipeline.clip.towers.text import MARK, ClassTexts, Position, Words, class_texts

DEVIATION = 0.02  # of prompts that start at random, everywhere in this family
TEMPLATE = "a photo of a {}."
WORDS = TEMPLATE.partition(f" {MARK}")[0]
PLACEHOLDER = "X"  # stands where context starts at random; any word of one token would do


class Prompts(NamedTuple):
    """Fresh prompts of one forward pass by block: [n, D] each.

    The context of the text tower's block 0 may also be per class [K, n, D] or per image [B, 1, n, D]. A tuple of
    dictionaries, in which ZeRO-3 finds the tensors that it has to follow backwards.
    """

    # By its whole name: what reads the types of a named tuple, as `make docs` does, knows no other.
    text: dict[int, torch.Tensor]
    vision: dict[int, torch.Tensor]


class PromptLearner(nn.Module):
    """The trainables of a method, in float32 whatever the backbone computes in; calling it gives its prompts.

    `template` with one `{}` makes the texts of the classes; `length` positions after the start token are learned.
    """

    name: ClassVar[str]
    learns: ClassVar[bool] = True  # whether there is anything to train; without it all seeds are alike
    takes_classes: ClassVar[bool] = False  # whether `per_class` of the recipe gives it an option `classes`
    per_image: ClassVar[bool] = False  # prompts depend on the image: text features cannot be kept
    position: Position = "end"

    def __init__(self, schedule: PromptSchedule, template: str, length: int = 0) -> None:
        super().__init__()
        self.schedule, self.template, self.length = schedule, template, length

    @property
    def changes_images(self) -> bool:
        """Whether image features depend on what is learned; else they may be computed once."""
        return bool(self.schedule.vision.adds)

    @property
    def classes(self) -> int | None:
        """The number of classes the trainables belong to; None when they fit any class list."""
        return None

    def texts(self, words: Words, names: Sequence[str]) -> ClassTexts:
        """The texts of these classes."""
        return class_texts(words, names, self.template, self.length, self.position)

    def regularisers(self, template: str) -> Sequence[Regulariser]:
        """Terms of the loss that belong to the method; `template` is what a text about the dataset says."""
        return ()

    def start_words(self) -> str | None:
        """Words whose embeddings the context starts from; None when it starts at random."""
        return None

    def start_from(self, rows: Tensor) -> None:
        """Let the context start from word embeddings [n, D]."""
        with torch.no_grad():
            self.get_parameter("ctx").copy_(rows)

    def prompts(self, images: Tensor | None = None) -> Prompts:
        """The prompts; `images` [B, J] are the image features, where a method is `per_image`."""
        raise NotImplementedError

    def forward(self, images: Tensor | None = None) -> Prompts:
        """See `prompts`."""
        text, vision = self.prompts(images)
        # Views, never the parameters themselves: under ZeRO-3 those are empty again once this forward has ended.
        return Prompts(*({block: v.view_as(v) for block, v in part.items()} for part in (text, vision)))


def placeholders(count: int) -> str:
    """`count` placeholder words."""
    return " ".join([PLACEHOLDER] * count)


def vectors(count: int, width: int) -> nn.Parameter:
    """`count` prompts that start at random."""
    return nn.Parameter(torch.empty(count, width).normal_(std=DEVIATION))


def deep_vectors(blocks: int, count: int, width: int) -> nn.ParameterList:
    """`count` prompts for each of so many deeper blocks."""
    return nn.ParameterList([vectors(count, width) for _ in range(blocks)])


def copies(layer: nn.Linear, count: int) -> nn.ModuleList:
    """`count` layers that start equal."""
    return nn.ModuleList([copy.deepcopy(layer) for _ in range(count)])
