"""The check of `train.vision_features: kept`: support by the model, and free disk space."""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.backbones.lmm_families import require_kept_features
from pipeline.config.data import DataConfig
from pipeline.data.grouped_order import image_groups
from pipeline.data.shards import DATASET_FILE, IndexedShards
from pipeline.errors import UserError
from pipeline.files.atomic import free_space
from pipeline.planning.model_files import ModelFiles
from pipeline.planning.plan import GIB


def check_kept_features(data: DataConfig, model: ModelFiles) -> str:
    """Disk space for the vision features of the prepared tasks' images, in words; UserError where it is not free.

    Counts images with distinct CLIP keys, so it needs prepared tasks; stored features are subtracted.
    """
    config = model.planned
    require_kept_features(config.model_type)
    layers = config.vision_feature_layer
    width = config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers))
    tokens = model.assumed_tokens().image if model.shipped else model.image_tokens
    per_image = tokens * width * torch.float16.itemsize
    images = kept = 0
    for task in data.tasks:
        folder = data.split_path(task.name, "train")
        if (folder / DATASET_FILE).is_file():
            keys = IndexedShards(folder).keys()
            count = min(task.limit_train or len(keys.has_image), len(keys.has_image))
            images += len(set(image_groups(keys)[:count][keys.has_image[:count].numpy()]))
            kept += sum(file.stat().st_size for file in folder.glob("vision-*/features-*"))
    needed = max(images * per_image - kept, 0)
    place = Path(data.prepared)
    free = free_space(place)
    size = f"{per_image / 1e6:.2f} MB per image, {needed / GIB:.1f} GiB for {images} images of the prepared tasks"
    if needed > free:
        raise UserError(
            f"train.vision_features: kept takes {size}, and {free / GIB:.1f} GiB are free on the disk of '{place}'; "
            "make room, set data.prepared elsewhere, or set train.vision_features to computed."
        )
    return f"{size}, {free / GIB:.1f} GiB free"
