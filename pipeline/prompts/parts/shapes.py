"""Sizes of the frozen decoder, from which a part says how much it trains, without a weight being read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.config.low_rank import IMAGE_LAYER, INPUT_LAYER, OUTPUT_LAYER


@dataclass(frozen=True)
class LinearShape:
    """One linear layer of the decoder, the output layer, the input embeddings, whose inputs are one-hot vectors, or the
    image projector."""

    name: str
    inputs: int
    outputs: int

    @property
    def is_output(self) -> bool:
        """Whether it is the output layer, which scores the words."""
        return self.name == OUTPUT_LAYER

    @property
    def is_words(self) -> bool:
        """Whether it is the input embeddings, which read token ids."""
        return self.name == INPUT_LAYER

    @property
    def reads(self) -> tuple[str, int]:
        """Name and width of its input, which query, key and value (and gate and up) share."""
        module, _, end = self.name.rpartition(".")
        return f"{module}.{'output' if end in ('o_proj', 'down_proj') else 'input'}", self.inputs


@dataclass(frozen=True)
class DecoderShape:
    """The decoder: its configuration (transformers' `text_config`) and its linear layers."""

    text: Any
    linears: tuple[LinearShape, ...] = ()
    image_width: int = 0  # V, of what the image projector reads for each image token; 0: it is not one for each
    key_width: int = 0  # K, of the CLIP keys that samples are compared by

    @property
    def width(self) -> int:
        """D, the width of its input embeddings."""
        return int(self.text.hidden_size)

    @property
    def words(self) -> LinearShape:
        """The input embeddings."""
        return LinearShape(INPUT_LAYER, int(self.text.vocab_size), self.width)

    @property
    def images(self) -> LinearShape:
        """The image projector, as a layer that is updated."""
        return LinearShape(IMAGE_LAYER, self.image_width, self.width)

    @property
    def layers(self) -> int:
        """Number of layers."""
        return int(self.text.num_hidden_layers)
