"""The processors of `tiny_families` with the image settings of the real checkpoints: only the tokenizer stays tiny."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests import tiny
from tests.backbones.tiny_families import FAMILIES

# preprocessor_config.json and processor_config.json, as far as sizes depend on them.
REAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fast_vlm": (
        {"size": {"height": 224, "width": 224}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": False},
        {"patch_size": 32, "vision_feature_select_strategy": "full", "num_additional_image_tokens": 0},
    ),
    "llava_next": (
        {
            "size": {"shortest_edge": 336},
            "crop_size": {"height": 336, "width": 336},
            "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        },
        {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    ),
    "qwen2_5_vl": (
        {
            "size": None,
            "min_pixels": 3136,
            "max_pixels": 12845056,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
        },
        {},
    ),
    "internvl": (
        {"size": {"height": 448, "width": 448}, "max_patches": 12, "min_patches": 1, "crop_to_patches": False},
        {"image_seq_length": 256},
    ),
    "idefics3": ({"size": {"longest_edge": 1456}, "max_image_size": {"longest_edge": 364}}, {"image_seq_len": 169}),
    "smolvlm": ({"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}}, {"image_seq_len": 64}),
    "gemma3": ({"size": {"height": 896, "width": 896}}, {"image_seq_length": 256}),
}


def with_real_settings(folder: Path, kind: str) -> Path:
    """Give a tiny checkpoint the image settings of its family's real ones."""
    for name, changes in zip(("preprocessor_config.json", "processor_config.json"), REAL[kind], strict=True):
        settings = {**json.loads((folder / name).read_text("utf-8")), **changes}
        kept = {field: value for field, value in settings.items() if value is not None}
        (folder / name).write_text(json.dumps(kept), "utf-8")
    return folder


def save_real(folder: Path, kind: str) -> Path:
    """A tiny random checkpoint of a family with the real image settings; its vision tower does not fit them."""
    FAMILIES[kind](folder)
    if kind == "llava":
        tiny.save_processor(folder, 336, 14)
        return folder
    return with_real_settings(folder, kind)
