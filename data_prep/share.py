"""Preparing a recipe's data by many processes together, such as the tasks of a Slurm array.

There are four steps: write the shards, write their index, compute CLIP keys, merge and verify. Processes share the
first and the third. Every shard is a file that is written atomically and kept once it exists, so any step can be
interrupted, repeated, or run by another number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.keys import KnownImages, encoder_of, write_some_keys
from data_prep.shards import write_shards, write_some_shards
from data_prep.sources.base import SourceSplit, source_class, source_split
from data_prep.sources.image_states import store_source_state, stored_fingerprint
from pipeline.backbones.clip import KeyEncoder, key_identity
from pipeline.data.shards import read_description
from pipeline.errors import UserError
from pipeline.files.lock import lock_of, waiting_for

if TYPE_CHECKING:
    from pipeline.config.data import DataConfig
    from pipeline.config.models import KeysConfig

SPLITS = ("train", "test")


@dataclass(frozen=True)
class Share:
    """The `number`-th of `count` processes, counted from 1."""

    number: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Share:
        """Read `3/100`; raises UserError for anything else."""
        number, _, count = text.partition("/")
        if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
            raise UserError(f"--share is '{text}'; expected NUMBER/COUNT with NUMBER from 1 to COUNT, as 3/100.")
        return cls(int(number), int(count))

    def of(self, shards: int) -> range:
        """Numbers of this process's shards: consecutive ones, as these read consecutive records of the source."""
        return range(shards * (self.number - 1) // self.count, shards * self.number // self.count)


def share_shards(data: DataConfig, share: Share) -> int:
    """Write this process's share of the shards of every split and return how many were missing."""
    wrote = 0
    for source, folder in _splits(data):
        samples = data.shard_samples
        numbers = share.of(-(-len(source) // samples))
        if numbers:
            fingerprint = _fingerprint(source, folder)
            _refuse_rewriting(folder, fingerprint, samples)
            read = partial(source.records, workers=data.workers)
            wrote += write_some_shards(read, folder, samples, fingerprint, numbers)
    return wrote


def _fingerprint(source: SourceSplit, folder: Path) -> str:
    """The source's fingerprint: the first process calls stat() for every image, the others read its stored result.

    A later change of an image is found by the final `prepare`, which calls stat() for all of them again.
    """
    known = stored_fingerprint(folder, source.root, source.text_names)
    if known is not None:
        return known
    with waiting_for(lock_of(folder), f"the fingerprint of {source.task}/{source.split}"):
        known = stored_fingerprint(folder, source.root, source.text_names)
        if known is None:
            known = source.fingerprint()
            store_source_state(folder, known, source.file_states(), source.images)
    return known


def _refuse_rewriting(folder: Path, fingerprint: str, samples: int) -> None:
    """Raise UserError when an existing split has another source or shard size; shared work never rewrites a split."""
    try:
        description = read_description(folder)
    except UserError:
        return
    if description.get("source_fingerprint") != fingerprint:
        raise UserError(
            f"{folder} was prepared from another state of the source or by another recipe. Run `python -m pipeline "
            "prepare RECIPE`, which says what differs, or set data.prepared to a new folder."
        )
    if description.get("shard_samples") != samples:
        raise UserError(
            f"{folder} was prepared in shards of {description.get('shard_samples')} samples, and data.shard_samples is "
            f"{samples}. Set that to {description.get('shard_samples')}, or data.prepared to a new folder."
        )


def join_shards(data: DataConfig) -> int:
    """Write the index and dataset.json of every split, and missing shards; returns the number of samples."""
    count = 0
    for source, folder in _splits(data):
        read, fingerprint = partial(source.records, workers=data.workers), _fingerprint(source, folder)
        samples = data.shard_samples
        _refuse_rewriting(folder, fingerprint, samples)
        description, _ = write_shards(read, folder, samples, fingerprint, source.task, source.split)
        count += description["count"]
    return count


def share_keys(data: DataConfig, keys: KeysConfig, share: Share) -> int:
    """Compute the missing CLIP keys of this process's share of the shards; returns for how many shards."""
    identity = key_identity(*keys.source)

    @cache
    def encoder() -> KeyEncoder:
        return encoder_of(keys)

    known_images: KnownImages = {}  # for all splits, so that an image in several of them is encoded once
    wrote = 0
    for task in data.tasks:
        for split in SPLITS:
            folder = data.split_path(task.name, split)
            numbers = share.of(len(read_description(folder)["shards"]))
            if numbers:
                wrote += write_some_keys(folder, identity, encoder, keys.batch, data.workers, numbers, known_images)
    return wrote


def _splits(data: DataConfig) -> Iterator[tuple[SourceSplit, Path]]:
    source_class(data).require_drawn(data)
    for task in data.tasks:
        for split in SPLITS:
            yield source_split(data, task, split), data.split_path(task.name, split)
