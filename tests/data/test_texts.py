"""Scoring reads the texts of a test set once, and never its images."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pipeline.data.checksums import CHECKSUMS_FILE, write_checksums
from pipeline.data.keys import Keys
from pipeline.data.sample import Sample
from pipeline.data.shard_files import ShardFiles
from pipeline.data.shards import IndexedShards
from pipeline.data.stage_data import StageData
from pipeline.data.texts import Texts
from pipeline.errors import UserError
from tests.training.worlds import make_samples


@pytest.fixture
def verified(prepared: Path) -> Path:
    """The split with checksums, as `prepare` leaves it."""
    shards = IndexedShards(prepared)
    write_checksums(prepared, shards.fingerprint, (shards.checksums(row) for row in range(len(shards))), ())
    return prepared


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(shard, size) of every read."""
    reads: list[tuple[int, int]] = []
    original = ShardFiles.read

    def counted(self: ShardFiles, shard: int, size: int, offset: int) -> bytes:
        reads.append((shard, size))
        return original(self, shard, size, offset)

    monkeypatch.setattr(ShardFiles, "read", counted)
    return reads


def stage_data(folder: Path) -> StageData:
    shards = IndexedShards(folder)
    keys: Keys = make_samples(len(shards))[1]
    return StageData([(shards, keys, None)])


def without_image(samples: list[Sample]) -> list[Sample]:
    return [dataclasses.replace(sample, image=None) for sample in samples]


def test_texts_are_those_of_the_samples_and_read_once(
    verified: Path, samples: list[Sample], read: list[tuple[int, int]]
) -> None:
    texts = Texts(stage_data(verified))
    assert list(texts) == without_image(samples)
    assert len(read) == len(samples)
    assert list(texts) == without_image(samples)
    assert len(read) == len(samples)


def test_no_image_is_read_for_a_text(verified: Path, read: list[tuple[int, int]]) -> None:
    shards = IndexedShards(verified)
    largest = max(size for _, size in shards._json.tolist())
    list(Texts(stage_data(verified)))
    assert max(size for _, size in read) <= largest < max(size for _, size in shards._image.tolist())


def test_a_text_that_was_changed_is_refused(verified: Path) -> None:
    shards = IndexedShards(verified)
    offset, size = shards._json[0].tolist()
    path = verified / "shard-000000.tar"
    content = bytearray(path.read_bytes())
    place = content.index(b"what is", offset, offset + size)
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="was changed since it was verified"):
        IndexedShards(verified).text(0)


def test_texts_without_checksums_of_their_own_are_checked_with_their_images(
    verified: Path, samples: list[Sample], read: list[tuple[int, int]]
) -> None:
    """As in splits that an earlier version prepared."""
    path, facts = verified / CHECKSUMS_FILE, {"fingerprint": IndexedShards(verified).fingerprint, "tables": "{}"}
    records: np.ndarray = load_file(path)["records"]
    save_file({"records": records}, path, facts)
    read.clear()
    assert IndexedShards(verified).text(0) == without_image(samples)[0]
    assert len(read) == 2
