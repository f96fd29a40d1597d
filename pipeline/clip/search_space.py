"""The options of a search as a learner: every block mixes its options of prompts with learned weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.clip.methods.base import DEVIATION, TEMPLATE, PromptLearner
from pipeline.clip.towers.backbone import Sizes
from pipeline.clip.towers.extra_keys import Mixed
from pipeline.clip.towers.schedule import keys_and_values

Start = Literal["small", "released"]
Arrangement = Literal["found", "shuffled", "even"]
ALPHA_DEVIATION = 1e-3  # standard deviation of the initial weights before the softmax, as released


@dataclass(frozen=True)
class TowerOptions:
    """The numbers of prompts that a block may get, by tower; each begins with 0 and increases."""

    text: tuple[int, ...]
    vision: tuple[int, ...]


class SearchSpace(PromptLearner):
    """Weights `alphas_<tower>` [blocks, C + 1], and prompts `ctx_<tower>.<block>_<n>` [n, D] of each option n > 0.

    Options share no vectors. The weights of a block are the softmax of its row, in float32 or more.

    Args:
        sizes: sizes of the backbone.
        options: the numbers of prompts to choose from.
        template: makes the class texts, which are not learned.
        start: small: prompts start as those of the training afterwards do (deviation 0.02); released: image prompts
            with deviation 1, text prompts uniform in [0, 1). Behind the layer norm that is the same scale, but
            gradients are many times smaller, so that prompts hardly move.
        plain: one attention per option, as released, instead of the equal and faster form.
    """

    name = "search"

    def __init__(
        self,
        sizes: Sizes,
        options: TowerOptions,
        template: str = TEMPLATE,
        start: Start = "small",
        plain: bool = False,
    ) -> None:
        super().__init__(keys_and_values(options.text[-1], options.vision[-1], sizes.blocks), template)
        self.options, self.plain = options, plain
        self.alphas_vision = _alphas(sizes.vision_blocks, len(options.vision))
        self.alphas_text = _alphas(sizes.text_blocks, len(options.text))
        self.ctx_vision = nn.ParameterDict()
        self.ctx_text = nn.ParameterDict()
        for prompts, blocks, lengths, width in (
            (self.ctx_vision, sizes.vision_blocks, options.vision, sizes.vision_width),
            (self.ctx_text, sizes.text_blocks, options.text, sizes.text_width),
        ):
            for block in range(blocks):
                for count in lengths[1:]:
                    values = torch.randn(count, width)
                    if start == "released" and prompts is self.ctx_text:
                        values = torch.rand(count, width)
                    prompts[f"{block}_{count}"] = nn.Parameter(values * (DEVIATION if start == "small" else 1.0))

    @property
    def alphas(self) -> dict[str, nn.Parameter]:
        """The weights before the softmax, by tower."""
        return {"text": self.alphas_text, "vision": self.alphas_vision}

    @property
    def vectors(self) -> dict[str, nn.Parameter]:
        """The prompts of all options by name."""
        return {name: value for name, value in self.named_parameters() if not name.startswith("alphas_")}

    def mixtures(self) -> tuple[dict[int, Mixed], dict[int, Mixed]]:
        """The mixtures of the text tower and of the image tower, by block."""
        return (
            self._of_tower(self.alphas_text, self.ctx_text, self.options.text),
            self._of_tower(self.alphas_vision, self.ctx_vision, self.options.vision),
        )

    def _of_tower(self, alphas: Tensor, prompts: nn.ParameterDict, lengths: Sequence[int]) -> dict[int, Mixed]:
        weights = alphas.softmax(dim=1)
        return {
            block: Mixed(tuple(prompts[f"{block}_{count}"] for count in lengths[1:]), weights[block], self.plain)
            for block in range(len(alphas))
        }

    def forward(self, images: Tensor | None = None) -> MixedPrompts:  # type: ignore[override]
        """See `mixtures`."""
        return MixedPrompts(*self.mixtures())


@dataclass(frozen=True)
class MixedPrompts:
    """The mixtures of one forward pass by block, in the place of `Prompts`."""

    text: dict[int, Mixed]
    vision: dict[int, Mixed]


def search_space(
    sizes: Sizes, options: TowerOptions, template: str = TEMPLATE, start: Start = "small", seed: int = 0
) -> SearchSpace:
    """A search space with initial values from `seed`, the same on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SearchSpace(sizes, options, template, start)


def _alphas(blocks: int, options: int) -> nn.Parameter:
    return nn.Parameter(ALPHA_DEVIATION * torch.randn(blocks, options))
