"""The embedded tasks: drawn by a seed into CoIN layout, then read by `data_prep.sources.coin` like any other data."""

from __future__ import annotations

import re
from pathlib import Path

from pipeline.files.lock import lock_of, waiting_for

STAMP = "GENERATED.txt"  # in the root: what was drawn


def draw(root: Path, seed: int, limit: tuple[int, int] | None = None) -> None:
    """Draw the embedded tasks into `root`; what the same generator, seed and limit drew before is left alone.

    `limit` is the number of (train, test) samples per task; None draws all. What another recipe drew with this seed is
    never made smaller. Raises UserError when `root` holds something that was not generated.
    """
    from data_prep.nano.tasks import fingerprint, write_coin  # here: only this source needs scikit-learn and its digits

    with waiting_for(lock_of(root), "the generated data"):
        said = (root / STAMP).read_text("utf-8").strip() if (root / STAMP).is_file() else ""
        match = re.search(r"train (\d+) test (\d+)$", said)
        there = (int(match.group(1)), int(match.group(2))) if match else (0, 0)
        if limit is not None and said == fingerprint(seed, there):
            # The first samples of a larger drawing are those of a smaller one, so one drawing serves both recipes.
            limit = (max(limit[0], there[0]), max(limit[1], there[1]))
        write_coin(root, seed, limit)  # leaves the same drawing alone
