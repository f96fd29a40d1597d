"""Gemma 3: attention within an image is bidirectional; word embeddings are scaled."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from pipeline.backbones.families.base import LMMFamily
from pipeline.data.image_sizes import ImageShape, ImageSizes
from pipeline.errors import UserError


class Gemma3Sizes(ImageSizes):
    """The whole image and, with pan-and-scan, crops along the longer side of an elongated one."""

    knob = "pan_and_scan_max_num_crops"

    def of(self, width: int, height: int) -> ImageShape:
        crops = self._crops(width, height)
        processor, size = self.processor, self.images.size
        length = int(processor.image_seq_length)
        one = processor.full_image_sequence.replace(self.token * length, self.token)
        text = one
        if crops:
            text = f"Here is the original image {one} and here are some crops to help you see better "
            text += " ".join([one] * crops)
        count, values = crops + 1, 3 * int(size["height"]) * int(size["width"])
        # SigLIP's patches are averaged 4 x 4 into tokens.
        return ImageShape(count * length, count, text, count, count * 16 * length, count * values)

    def _crops(self, width: int, height: int) -> int:
        scan = self.options.get("images_kwargs", {})
        if not scan.get("do_pan_and_scan"):
            return 0
        longer, shorter = max(width, height), min(width, height)
        least, most = scan["pan_and_scan_min_crop_size"], scan["pan_and_scan_max_num_crops"]
        if longer / shorter < scan["pan_and_scan_min_ratio_to_activate"]:
            return 0
        crops = min(math.floor(longer / least), math.floor(longer / shorter + 0.5))
        crops = min(most, max(2, crops))
        return 0 if min(math.ceil(longer / crops), shorter) < least else crops

    def limit(self, most: int) -> int:
        crops = most // int(self.processor.image_seq_length)
        if crops > 2:  # pan-and-scan makes at least two crops, besides the whole image
            self.options = {
                "images_kwargs": {
                    "do_pan_and_scan": True,
                    "pan_and_scan_max_num_crops": crops - 1,
                    "pan_and_scan_min_crop_size": 256,
                    "pan_and_scan_min_ratio_to_activate": 1.2,
                }
            }
        return int(self.processor.image_seq_length)


class Gemma3(LMMFamily):
    """Gemma 3; most of its layers have sliding-window attention."""

    kind = "gemma3"
    sizes = Gemma3Sizes
    image_prefix_tokens = 1  # <start_of_image>
    image_suffix_tokens = 1  # <end_of_image>
    needs_image_mask = True
    scales_embeddings = True
    lean_attentions = ()  # it normalises queries and keys
    gated_mlps = ()  # its activation is GELU

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        if model.config._attn_implementation not in ("sdpa", "eager"):
            raise UserError(
                f"Gemma 3 with attention '{model.config._attn_implementation}' cannot attend in both directions "
                "within an image; expected sdpa or eager. Set model.attn_implementation."
            )
        self.embedding_scale = model.config.text_config.hidden_size**0.5

    def decoder_inputs(
        self, embeddings: Tensor, attention: Tensor, image_mask: Tensor | None, images: dict[str, Tensor] | None
    ) -> dict[str, Any]:
        assert image_mask is not None
        masks = self.model.create_masks_for_generate(
            config=self.model.config,
            inputs_embeds=embeddings,
            attention_mask=attention,
            past_key_values=None,
            position_ids=None,
            token_type_ids=image_mask.long(),
        )
        return {"attention_mask": masks}  # a mask for full and one for sliding-window attention

    def needs_one_pass(self) -> str:
        return "Gemma 3 has sliding-window attention layers, which cannot continue from a prefix cache"
