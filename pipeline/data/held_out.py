"""Which training samples are held out of training, to make choices with: gate, k, calibration, the advice of `add`.

Test sets are for scoring alone, so what is chosen is chosen on these. They are told by a hash of each sample's id:
neither the order of the records nor other tasks, seeds, ranks or restarts change which they are, and the prepared
files stay as they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]
MOST = 500  # of one task: enough to tell one percent from two
# Begins every hash: other tools that split by hashes of ids should not pick the same samples.
_BEGUN = hashlib.blake2b(b"held out of training\n", digest_size=8)


def held_out_rows(ids: Iterable[str], share: float, most: int = MOST) -> Rows:
    """The rows [H], in rising order, of the samples that are held out of those with these `ids` [N].

    H is the rounded `share` of N, at most `most`: those with the smallest hashes.
    """
    hashes = _hashes(ids)
    count = min(most, round(share * len(hashes)))
    if count < 1:
        return np.empty(0, dtype=np.int64)
    # Equal hashes are equal ids, in practice; then the earlier record counts as the smaller.
    return np.sort(np.argsort(hashes, kind="stable")[:count]).astype(np.int64)


def other_rows(count: int, rows: Rows) -> Rows:
    """The rows of `count` samples that are not among `rows`, in rising order."""
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
