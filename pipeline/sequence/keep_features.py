"""Precompute the vision tower's features of a stage's pictures, which training then reads in every epoch.

The features are the input of the projector, so they do not depend on a trained projector. All ranks share the work and
run the same modules, so it works under ZeRO-3 too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.backbones.base_model import of_the_checkpoint
from pipeline.backbones.lmm import LMM
from pipeline.data.example import picture_digest
from pipeline.data.kept_features import NO_PICTURE, PICTURES, KeptFeatures, SplitFeatures, number_pictures
from pipeline.data.shards import IndexedShards
from pipeline.data.stage_data import Samples
from pipeline.data.stored_pictures import UPRIGHT, changed_pictures
from pipeline.errors import UserError
from pipeline.files.atomic import sweep_temporaries
from pipeline.files.lock import FileLock, lock_of
from pipeline.ranks.watchdog import Watchdog
from pipeline.ranks.world import World, gather_objects, on_main, together
from pipeline.sequence.data import Part

log = logging.getLogger(__name__)
POLL_S, TOLD_EVERY = 1.0, 60  # seconds between two attempts to get a lock, and attempts between two log lines
FAR = 0.01  # tolerated difference relative to the largest feature; other GPUs and library versions round differently


@dataclass(frozen=True)
class _Work:
    """The ranks that compute features, their watchdog, and the number of decoding threads of each."""

    world: World
    watchdog: Watchdog
    threads: int
    each_round: Callable[[], object]  # called by all ranks together


def keep_features(
    lmm: LMM,
    parts: Sequence[Part],
    base_model: str,
    world: World,
    watchdog: Watchdog,
    threads: int = 1,
    each_round: Callable[[], object] | None = None,
) -> KeptFeatures:
    """The features of a stage's parts, stored beside their prepared data; missing ones are computed.

    Stored features are verified for the first pictures: small differences are logged, features of another model are a
    UserError.

    Args:
        lmm: the frozen model.
        parts: the training samples of the stage's tasks.
        base_model: the fingerprint of the frozen model.
        world: the ranks.
        watchdog: is notified of progress.
        threads: decoding threads per rank.
        each_round: called by all ranks together while they compute or wait for another job. When it raises, the
            features so far are kept.
    """
    work = _Work(world, watchdog, threads, each_round or watchdog.progress)
    identity = _identity(lmm, base_model)
    shape = _tower(lmm, [lmm.conversation.blank["pixel_values"]], world).shape[1:]
    found, used = [], []
    for part in parts:
        samples, count, rows = together(lambda part=part: _whole(part))  # type: ignore[misc]
        own = _identity_in(samples, identity)
        split = SplitFeatures(samples.folder / f"vision-{own[:12]}", own)
        numbers = _keep_split(lmm, split, samples, count, shape, work)
        found.append((split, samples, numbers))
        used.append((split, numbers if rows is None else numbers[rows]))
    kept = KeptFeatures(used, shape)
    for split, samples, numbers in found:
        first = _firsts(numbers)[:PICTURES]
        if first:
            _check(lmm, split, samples, first, world)
    return kept


def _keep_split(
    lmm: LMM, split: SplitFeatures, samples: IndexedShards, count: int, shape: torch.Size, work: _Work
) -> npt.NDArray[np.int64]:
    """Complete the features of one split; returns the picture's number of each of its first `count` samples."""

    def whole() -> npt.NDArray[np.int64] | None:
        numbers = split.read_numbers(count)
        return None if numbers is None or _missing(split, numbers) else numbers

    world = work.world
    known = on_main(world, whole)
    if known is not None:
        return known  # nothing is written, so the folder may be read-only
    with _alone_in(samples.folder, work):
        on_main(world, lambda: sweep_temporaries(split.folder))
        numbers = on_main(world, lambda: split.read_numbers(count))  # another job may have made them meanwhile
        if numbers is None:
            numbers = _number(samples, count, world, work.watchdog)
            on_main(world, lambda: split.write_numbers(numbers))
        _compute(lmm, split, samples, numbers, shape, work)
    return numbers


@contextlib.contextmanager
def _alone_in(folder: Path, work: _Work) -> Iterator[None]:
    """Hold the lock of a split's folder; all ranks poll it together while another job holds it."""
    lock, tries = FileLock(lock_of(folder)), 0
    try:
        while not on_main(work.world, lock.acquire):
            if work.world.main and tries % TOLD_EVERY == 0:
                log.warning("waiting for %s, which is at work on %s", lock.holder(), folder)
            tries += 1
            work.each_round()
            time.sleep(POLL_S)
        yield
    finally:
        lock.release()


def _whole(part: Part) -> tuple[IndexedShards, int, npt.NDArray[np.int64] | None]:
    """The split of a part, the number of its first samples that are numbered, and the part's rows among them.

    Pictures of held-out samples are numbered too, so that the stored features do not depend on which are held out.
    """
    samples, _, limit = part
    rows = getattr(samples, "rows", None)
    if rows is None:
        return samples, min(limit or len(samples), len(samples)), None
    return samples.whole(), int(rows[-1]) + 1, rows


def _identity(lmm: LMM, base_model: str) -> str:
    """A hash of everything the features depend on besides the picture."""
    # The vision tower is not quantised, so runs with and without quantised weights share the features.
    facts = {"model": of_the_checkpoint(base_model), "dtype": str(lmm.dtype), "square": lmm.conversation.padded}
    if lmm.conversation.stretched is not None:
        facts["stretched"] = lmm.conversation.stretched
    facts["preprocessing"] = json.loads(lmm.processor.image_processor.to_json_string())
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _identity_in(samples: Samples, identity: str) -> str:
    """The identity of a split's features; it differs where earlier versions decoded the split's files differently."""
    if not changed_pictures(getattr(samples, "description", {})):
        return identity
    return hashlib.sha256(f"{identity} {UPRIGHT}".encode()).hexdigest()


def _number(samples: Samples, count: int, world: World, watchdog: Watchdog) -> npt.NDArray[np.int64]:
    """The picture's number of each sample; every rank reads its share of the files."""

    def read() -> list[bytes]:
        own = []
        for index in range(world.rank, count, world.size):
            own.append(picture_digest(samples[index].image))
            watchdog.progress()
        return own

    own = together(read)
    digests = [b""] * count
    for rank, share in enumerate(gather_objects(own)):
        digests[rank :: world.size] = share
    return number_pictures(digests)


def _firsts(numbers: npt.NDArray[np.int64]) -> list[int]:
    """The first sample of each picture, in the pictures' order."""
    pictures, firsts = np.unique(numbers, return_index=True)
    return firsts[pictures != NO_PICTURE].tolist()


def _files(numbers: npt.NDArray[np.int64]) -> list[list[int]]:
    """The first samples of the pictures of each file."""
    firsts = _firsts(numbers)
    return [firsts[start : start + PICTURES] for start in range(0, len(firsts), PICTURES)]


def _missing(split: SplitFeatures, numbers: npt.NDArray[np.int64]) -> list[int]:
    """The numbers of the files that are missing or incomplete."""
    return [number for number, file in enumerate(_files(numbers)) if not split.is_whole(number, len(file))]


def _compute(
    lmm: LMM,
    split: SplitFeatures,
    samples: Samples,
    numbers: npt.NDArray[np.int64],
    shape: torch.Size,
    work: _Work,
) -> None:
    world = work.world
    firsts, files = _firsts(numbers), _files(numbers)
    missing = on_main(world, lambda: _missing(split, numbers))
    if missing:
        size = sum(len(files[number]) for number in missing) * shape.numel() * torch.float16.itemsize
        log.info(
            "computing the vision features of %d pictures, %.1f MB, into %s", len(firsts), size / 1e6, split.folder
        )
    for start in range(0, len(missing), world.size):
        turn = start + world.rank
        number = missing[turn] if turn < len(missing) else None
        # A rank without work runs the tower on a blank picture, because under ZeRO-3 the others wait for it.
        pixels = together(lambda: _pixels(lmm, samples, [] if number is None else files[number], work.threads))  # noqa: B023
        features = _tower(lmm, pixels, world)
        together(lambda: None if number is None else split.write(number, features))  # noqa: B023 - called at once
        work.each_round()
    if missing:
        on_main(world, lambda: split.describe(len(firsts), shape))


def _pixels(lmm: LMM, samples: Samples, indices: Sequence[int], threads: int = 1) -> list[Tensor]:
    """Pixels [1, 3, H, W] of the samples' pictures; of a blank picture where `indices` is empty."""
    if not indices:
        return [lmm.conversation.blank["pixel_values"]]

    def pixels(index: int) -> Tensor:
        # Without text, which could be too long for the model.
        alone = dataclasses.replace(samples[index], question="", answer="", meta={})
        images = lmm.conversation.example(alone).images
        assert images is not None
        return images["pixel_values"]

    with ThreadPoolExecutor(max(threads, 1)) as pool:
        return list(pool.map(pixels, indices))


def _tower(lmm: LMM, pixels: Sequence[Tensor], world: World) -> Tensor:
    """The projector's input [n, tokens, width] for these pictures."""
    return lmm.tower_features({"pixel_values": torch.cat(list(pixels)).to(world.device)})


def _check(lmm: LMM, split: SplitFeatures, samples: Samples, indices: Sequence[int], world: World) -> None:
    """Compare the first file bit by bit with the features that the tower computes now."""
    # Reading and comparing are separate from the tower: a rank's error must not leave the others in its collectives.
    kept = together(lambda: torch.stack([split.read(picture) for picture in range(len(indices))]))
    pixels = together(lambda: _pixels(lmm, samples, indices))
    now = _tower(lmm, pixels, world).to("cpu", torch.float16)
    together(lambda: _compare(kept, now, split))


def _compare(kept: Tensor, now: Tensor, split: SplitFeatures) -> None:
    """Log small differences of features [n, tokens, width]; UserError for those of another model."""
    if torch.equal(kept, now):
        return
    off = float((kept.float() - now.float()).abs().max() / now.float().abs().max().clamp(min=1e-6))
    if off > FAR:
        raise UserError(
            f"The vision features in {split.folder} are not those of this model: they differ by up to {off:.1%} of the "
            "largest. Remove that folder and run the same command again to compute them anew."
        )
    log.warning(
        "The vision features in %s were computed on another machine or by another version: they differ by up to %.1e "
        "of the largest from what this one computes.",
        split.folder,
        off,
    )
