"""Writes a prepared split of noise images, for measurements without real data."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.shards import write_shards
from pipeline.data.sample import Sample

WIDTH, HEIGHT = 640, 480  # of a typical photograph in CoIN
DRAWN = 64  # distinct pictures; further files differ by a few bytes after the end of the picture


def write_noise(folder: Path, samples: int, shard_samples: int = 500) -> Path:
    """Write shards and index of `samples` samples with distinct JPEGs of about 150 kB; returns `folder`."""
    pictures = [draw_jpeg(number) for number in range(min(samples, DRAWN))]

    def read(start: int) -> list[Sample]:
        return [
            Sample(f"s{number}", pictures[number % DRAWN] + b"%d" % number, f"What is in picture {number}?", "Noise.")
            for number in range(start, samples)
        ]

    write_shards(read, folder, shard_samples, "noise", "noise", "train")
    return folder


def draw_jpeg(seed: int) -> bytes:
    """A noise image of about 150 kB, different for every seed."""
    # Coarse noise under fine noise compresses about as well as a photograph.
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 200, (HEIGHT // 32, WIDTH // 32, 3), dtype=np.uint8)
    fine = random.integers(0, 56, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    pixels = np.kron(coarse, np.ones((32, 32, 1), dtype=np.uint8)) + fine
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=80)
    return buffer.getvalue()
