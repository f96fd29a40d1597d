"""A model family: VipLLaVA, which is LLaVA-1.5 with a projector that reads several layers of the vision tower."""

from __future__ import annotations

from pipeline.backbones.families.base import LMMFamily
from pipeline.backbones.families.llava import LlavaSizes


class VipLlava(LMMFamily):
    """One crop of a fixed size, as many tokens as patches; the decoder is Llama's."""

    kind = "vipllava"  # model_type in config.json
    processor = "LlavaProcessor"
    supports_vicuna_template = True
    sizes = LlavaSizes
