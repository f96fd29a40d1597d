"""The vision tower's features of photographs and drawings, computed once and kept in a file."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_prep.assemble.checkpoint import image_processor
from data_prep.assemble.recipe import VisionConfig
from data_prep.assemble.vision import Tower
from data_prep.small.drawings import Drawing, draw
from pipeline.data.pictures import decode_image
from pipeline.errors import UserError
from pipeline.files.atomic import replacing

BATCH = 16  # pictures per forward pass
HELD_OUT = 10  # one picture in so many is for the scores that are printed


@dataclass(frozen=True)
class Pictures:
    """Features [n, places, width] in float16 of photographs, and of drawings with what they show."""

    photographs: Tensor
    drawn: Tensor
    drawings: list[Drawing]

    def split(self) -> tuple[Pictures, Pictures]:
        """Those to train on, and those held out: every tenth."""
        held = [torch.arange(n) % HELD_OUT == 0 for n in (len(self.photographs), len(self.drawn))]
        return tuple(
            Pictures(
                self.photographs[chosen[0]],
                self.drawn[chosen[1]],
                [drawing for drawing, kept in zip(self.drawings, chosen[1].tolist(), strict=True) if kept],
            )
            for chosen in ([~mask for mask in held], held)
        )  # type: ignore[return-value]


def drawings_of(seed: int, count: int) -> list[Drawing]:
    """Drawings that are a function of seed and number."""
    return [draw(np.random.default_rng([seed, number])) for number in range(count)]


def pictures(tower: Tower, vision: VisionConfig, files: Sequence[Path], count: int, work: Path) -> Pictures:
    """Features of these photographs and of `count` drawings; read from a file in `work` where they are there."""
    drawings = drawings_of(0, count)
    asked = [vision.sha256, vision.image_size, vision.mean, vision.deviation, count]
    asked += [f"{path.name} {path.stat().st_size}" for path in files]
    kept = work / f"features-{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]}.safetensors"
    if kept.is_file():
        found = load_file(kept)
        return Pictures(found["photographs"], found["drawn"], drawings)
    processor = image_processor(vision.image_size, vision.mean, vision.deviation)
    photographs = _features(tower, processor, map(_read, files), len(files), "photographs")
    drawn = _features(tower, processor, (drawing.picture for drawing in drawings), count, "drawings")
    with replacing(kept) as temporary:
        save_file({"photographs": photographs, "drawn": drawn}, temporary)
    return Pictures(photographs, drawn, drawings)


def photographs_in(folder: Path, like: str) -> list[Path]:
    """The files of a folder whose names match a pattern; UserError where there are none."""
    found = sorted(path for path in folder.glob(like) if path.is_file()) if folder.is_dir() else []
    if not found:
        raise UserError(f"There are no files {like} in {folder}; expected a folder of photographs.")
    return found


def _read(path: Path) -> Image.Image:
    return decode_image(path.read_bytes())


@torch.inference_mode()
def _features(tower: Tower, processor: Any, images: Iterator[Image.Image], count: int, what: str) -> Tensor:
    model = tower.model.to(memory_format=torch.channels_last)
    found: list[Tensor] = []
    started, chunk = time.time(), list[Image.Image]()
    for number, image in enumerate(images, 1):
        chunk.append(image)
        if len(chunk) == BATCH or number == count:
            pixels = processor(images=chunk, return_tensors="pt")["pixel_values"]
            maps = model(pixels.contiguous(memory_format=torch.channels_last)).last_hidden_state
            found.append(maps.flatten(2).transpose(1, 2).half())
            chunk = []
        if number % (20 * BATCH) == 0:
            print(f"{number} of {count} {what}, {time.time() - started:.0f} s", flush=True)
    return torch.cat(found)
