"""What a regulariser is: further terms of a method's loss, which mostly keep it near the frozen model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from pipeline.clip.towers.backbone import Backbone
from pipeline.clip.towers.text import Words


@dataclass(frozen=True)
class Features:
    """What a regulariser sees of a batch.

    `images` [B, J] and `texts` [K, J], not normalised, `logits` [B, K], and `share` [B] of each sample in the loss.
    """

    images: Tensor
    texts: Tensor
    logits: Tensor
    share: Tensor
    pixel_values: Tensor | None


class Regulariser:
    """Terms added to the cross-entropy, named in `names`; `start` is called whenever the classes change."""

    names: ClassVar[tuple[str, ...]]

    def start(self, backbone: Backbone, words: Words, names: Sequence[str]) -> None:
        raise NotImplementedError

    def terms(self, backbone: Backbone, features: Features) -> dict[str, Tensor]:
        """The weighted terms of this batch by name."""
        raise NotImplementedError
