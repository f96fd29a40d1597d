"""Test images: decoded by threads, kept as 8-bit pixels while there is room, and the same to the bit as one by one."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.clip.images.pixels import Pixels
from pipeline.clip.images.ready_pixels import ReadyPixels, Room, ranks_here
from pipeline.data.sample import Sample
from pipeline.errors import UserError
from pipeline.ranks.world import World
from tests.clip.project import save_model

SIZES = [(40, 30), (17, 90), (16, 16), (300, 5), (1, 1), (33, 32), (64, 64)]
BYTES = 3 * 16 * 16  # of one image's 8-bit pixels


class Shards:
    """Pictures in memory, read as shards are."""

    folder = Path("shards")
    ids = tuple(f"{number}.png" for number in range(len(SIZES)))

    def __getitem__(self, row: int) -> Sample:
        width, height = SIZES[row]
        noise = np.random.default_rng(row).integers(0, 256, (height, width, 3)).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).save(file, "PNG")
        return Sample(self.ids[row], file.getvalue(), "", "")


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> Pixels:
    return Pixels(save_model(tmp_path_factory.mktemp("model")))


def ready(pixels: Pixels, room: int, shards: Any = None) -> ReadyPixels:
    return ReadyPixels(shards or Shards(), pixels, Room(room), threads=2)  # type: ignore[arg-type]


def together(images: ReadyPixels, rows: list[int], size: int = 3) -> torch.Tensor:
    return torch.cat(list(images.batches(rows, size, torch.device("cpu"))))


def one_by_one(pixels: Pixels, rows: list[int]) -> torch.Tensor:
    pictures = [Shards()[row].picture() for row in rows]
    return torch.stack([pixels.plain(picture) for picture in pictures if picture is not None])


@pytest.mark.parametrize("room", [0, 2 * BYTES, 100 * BYTES])
def test_pixels_are_those_of_the_processor_to_the_bit(pixels: Pixels, room: int) -> None:
    images, rows = ready(pixels, room), [3, 0, 6, 1, 2, 5, 4]
    for _ in range(2):
        assert torch.equal(together(images, rows), one_by_one(pixels, rows))


def test_a_processor_that_does_more_than_normalise_is_left_to_it(
    pixels: Pixels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pixels, "_table", None)
    assert torch.equal(together(ready(pixels, 10**6), [0, 1]), one_by_one(pixels, [0, 1]))


@pytest.mark.parametrize("change", [{"do_normalize": False}, {"do_rescale": False}, {"rescale_factor": 1 / 127.5}])
def test_every_setting_of_the_processor_is_in_the_table(
    pixels: Pixels, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    for name, value in change.items():
        monkeypatch.setattr(pixels.processor, name, value)
    monkeypatch.setattr(pixels, "_table", pixels._normalisation())
    assert torch.equal(together(ready(pixels, 10**6), [0, 1, 2]), one_by_one(pixels, [0, 1, 2]))


@pytest.mark.parametrize(("room", "decoded"), [(100 * BYTES, 7), (3 * BYTES, 7 + 4), (0, 14)])
def test_what_is_kept_is_decoded_once(pixels: Pixels, monkeypatch: pytest.MonkeyPatch, room: int, decoded: int) -> None:
    threads: list[threading.Thread] = []
    cropped = pixels.cropped

    def counted(picture: Image.Image) -> np.ndarray:
        threads.append(threading.current_thread())
        return cropped(picture)

    monkeypatch.setattr(pixels, "cropped", counted)
    images = ready(pixels, room)
    for _ in range(2):
        together(images, list(range(7)))
    assert len(threads) == decoded
    assert threading.main_thread() not in threads


def test_splits_share_the_room(pixels: Pixels) -> None:
    room = Room(5 * BYTES)
    for _ in range(2):
        together(ReadyPixels(Shards(), pixels, room, 1), [0, 1, 2])  # type: ignore[arg-type]
    assert room.left == 0


def test_few_pictures_wait_for_the_model(pixels: Pixels) -> None:
    read: list[int] = []

    class Counted(Shards):
        def __getitem__(self, row: int) -> Sample:
            read.append(row)
            return super().__getitem__(row % len(SIZES))

    batches = ready(pixels, 0, Counted()).batches(list(range(1000)), 1, torch.device("cpu"))
    next(batches)
    assert len(read) < 20
    batches.close()  # type: ignore[attr-defined]


def test_a_damaged_image_is_named(pixels: Pixels) -> None:
    class Damaged(Shards):
        def __getitem__(self, row: int) -> Sample:
            return Sample(self.ids[row], b"no image", "", "")

    with pytest.raises(UserError, match=r"the image 2\.png cannot be decoded"):
        together(ready(pixels, 0, Damaged()), [2])


def test_the_room_is_shared_by_the_ranks_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(0, 16, 0, torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert ranks_here(world) == 8 and 0 < Room.of(world).left <= (8 << 30) // 8
