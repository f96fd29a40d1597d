"""Selects the training samples that are held out for choices: gate, k, calibration, the advice of `add`.

Test sets are used only for scoring. Held-out samples are selected by a hash of their ids, so the selection depends on
neither the order of records nor other tasks, seeds, ranks or restarts, and prepared files are not changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]
MOST = 500  # samples per task; enough to distinguish one percent from two
# Prefix of every hash, so that other tools which split by hashes of ids do not select the same samples.
_BEGUN = hashlib.blake2b(b"held out of training\n", digest_size=8)


def held_out_rows(ids: Iterable[str], share: float, most: int = MOST) -> Rows:
    """The rows [H], in ascending order, of the held-out samples among those with these `ids` [N].

    They are the H samples with the smallest hashes; H is the rounded `share` of N, at most `most`.
    """
    hashes = _hashes(ids)
    count = min(most, round(share * len(hashes)))
    if count < 1:
        return np.empty(0, dtype=np.int64)
    # Equal hashes mean equal ids in practice; the stable sort then puts the earlier record first.
    return np.sort(np.argsort(hashes, kind="stable")[:count]).astype(np.int64)


def other_rows(count: int, rows: Rows) -> Rows:
    """The rows of `count` samples that are not in `rows`, in ascending order."""
    kept = np.ones(count, dtype=bool)
    kept[rows] = False
    return np.flatnonzero(kept)


def _hashes(ids: Iterable[str]) -> npt.NDArray[np.uint64]:
    """The first 64 bits [N] of BLAKE2b of each id."""
    found = bytearray()
    for identity in ids:
        digest = _BEGUN.copy()
        digest.update(identity.encode())
        found += digest.digest()
    return np.frombuffer(found, dtype="<u8").astype(np.uint64)
