"""A warning of `check` about pictures of which the model sees the centre only."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.data.sample import Sample
from pipeline.planning.model_files import ModelFiles, picture_sizes

SEEN = 0.8  # share of a picture below which the warning is given: 4:3 photographs lose a quarter of their area


def cut_off(model: ModelFiles, samples: Sequence[Sample]) -> list[str]:
    """The warning, if the processor cuts the sides off one of these samples' pictures; a list of none or one.

    LLaVA-1.5's processor resizes the shorter side and crops the middle: of a line of text, or of a chart of 4:1, it
    leaves a quarter, and nothing else says so.
    """
    images = model.processor.image_processor
    one_size = model.conversation.sizes.one_size
    if model.settings.image_padding != "none" or one_size is None or not getattr(images, "do_center_crop", False):
        return []
    if "shortest_edge" not in (getattr(images, "size", None) or {}):
        return []
    high, wide = one_size
    shares = []
    for width, height in picture_sizes(samples):
        scale = images.size["shortest_edge"] / min(width, height)
        shares.append(min(1.0, wide / (width * scale)) * min(1.0, high / (height * scale)))
    few = [share for share in shares if share < SEEN]
    if not few:
        return []
    return [
        f"The processor of '{model.settings.path}' cuts images to their centre: of {len(few)} of {len(shares)} "
        f"pictures that were looked at, the model sees less than {SEEN:.0%}, of one {min(few):.0%}. Set "
        "model.image_padding to stretch (whole, resized to a square) or square (whole, with a border) if what is at "
        "the sides matters."
    ]
