"""The base of all methods: a learner gives prompts for the blocks of each tower, on a schedule, and class texts."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.clip.methods.regulariser import Regulariser
from pipeline.clip.towers.schedule import PromptSchedule
from pipeline.clip.towers.text import MARK, ClassTexts, Position, Words, class_texts

DEVIATION = 0.02  # standard deviation of random initial prompts, the same in all published methods
TEMPLATE = "a photo of a {}."
WORDS = TEMPLATE.partition(f" {MARK}")[0]
PLACEHOLDER = "X"  # a word of one token, whose embedding a learned vector replaces


class Prompts(NamedTuple):
    """The prompts of one forward pass by block: [n, D] each.

    The context of the text tower's block 0 may also be class-specific [K, n, D] or per image [B, 1, n, D]. The type is
    a tuple of dictionaries, because ZeRO-3 looks for the output tensors of a module only in such containers, to hook
    their backward pass.
    """

    # `torch.Tensor`, not `Tensor`: tools that resolve a named tuple's types (`make docs`) only find the full name.
    text: dict[int, torch.Tensor]
    vision: dict[int, torch.Tensor]


class PromptLearner(nn.Module):
    """The trainables of a method, made in float32; calling it returns its prompts.

    Args:
        schedule: how many prompts enter and leave each block.
        template: makes the class texts, with one `{}` for the class name.
        length: the number of learned positions after the start token.
    """

    name: ClassVar[str]
    learns: ClassVar[bool] = True  # whether it has trainables; without, no seed changes the result
    takes_classes: ClassVar[bool] = False  # whether the recipe's `per_class` sets its option `classes`
    searches: ClassVar[bool] = False  # whether the recipe's `search` finds its options `text` and `vision`
    per_image: ClassVar[bool] = False  # whether prompts depend on the image, so that text features do too
    position: Position = "end"  # of the class name, see `class_texts`

    def __init__(self, schedule: PromptSchedule, template: str, length: int = 0) -> None:
        super().__init__()
        self.schedule, self.template, self.length = schedule, template, length

    @classmethod
    def refuse_values(cls, options: Mapping[str, Any]) -> None:
        """Raise UserError for values of options, each of the right type, that make no learner on any backbone."""

    @property
    def changes_images(self) -> bool:
        """Whether there are image prompts; without them image features can be computed once."""
        return bool(self.schedule.vision.adds) or any(self.schedule.vision.kv)

    @property
    def classes(self) -> int | None:
        """The number of classes of class-specific contexts; None when the context is shared by all classes."""
        return None

    def texts(self, words: Words, names: Sequence[str]) -> ClassTexts:
        """The texts of these classes."""
        return class_texts(words, names, self.template, self.length, self.position)

    def regularisers(self, template: str) -> Sequence[Regulariser]:
        """Further terms of the method's loss; `template` is the dataset's text template."""
        return ()

    def start_words(self) -> str | None:
        """Words whose embeddings are the initial context; None when it is initialised at random."""
        return None

    def start_from(self, rows: Tensor) -> None:
        """Initialise the context with word embeddings [n, D]."""
        with torch.no_grad():
            self.get_parameter("ctx").copy_(rows)

    def prompts(self, images: Tensor | None = None) -> Prompts:
        """The prompts; `images` [B, J] are the image features, for methods that are `per_image`."""
        raise NotImplementedError

    def forward(self, images: Tensor | None = None) -> Prompts:
        """See `prompts`."""
        text, vision = self.prompts(images)
        # Return views of the parameters: ZeRO-3 releases the parameters themselves when this forward ends.
        return Prompts(*({block: v.view_as(v) for block, v in part.items()} for part in (text, vision)))


def placeholders(count: int) -> str:
    """`count` placeholder words."""
    return " ".join([PLACEHOLDER] * count)


def vectors(count: int, width: int) -> nn.Parameter:
    """`count` prompts [count, width], initialised at random."""
    return nn.Parameter(torch.empty(count, width).normal_(std=DEVIATION))


def deep_vectors(blocks: int, count: int, width: int) -> nn.ParameterList:
    """`count` prompts [count, width] for each of `blocks` deeper blocks."""
    return nn.ParameterList([vectors(count, width) for _ in range(blocks)])


def copies(layer: nn.Linear, count: int) -> nn.ModuleList:
    """`count` layers with equal initial values."""
    return nn.ModuleList([copy.deepcopy(layer) for _ in range(count)])
