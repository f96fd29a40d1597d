"""The interface of regularisers: further terms of the loss, such as distances to the frozen model's features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from pipeline.clip.towers.backbone import Backbone
from pipeline.clip.towers.text import Words


@dataclass(frozen=True)
class Features:
    """The features of a batch: `images` [B, J] and `texts` [K, J], not normalised, and `logits` [B, K].

    `share` [B] is each sample's weight divided by the total weight of the optimizer step; `pixel_values` [B, 3, H, W]
    are None where image features were computed once.
    """

    images: Tensor
    texts: Tensor
    logits: Tensor
    share: Tensor
    pixel_values: Tensor | None


class Regulariser:
    """Terms that are added to the cross-entropy; `names` are the terms' names."""

    names: ClassVar[tuple[str, ...]]

    def start(self, backbone: Backbone, words: Words, names: Sequence[str]) -> None:
        """Compute what depends on the class names `names`; called whenever the classes change."""
        raise NotImplementedError

    def terms(self, backbone: Backbone, features: Features) -> dict[str, Tensor]:
        """The weighted terms of this batch by name."""
        raise NotImplementedError
