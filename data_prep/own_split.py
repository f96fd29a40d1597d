"""Which samples of a user's table are for testing: those of its own splits, else whole images, drawn by a seed."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from data_prep.own_rows import Checked, Rows
from data_prep.tables.open import Table
from pipeline.errors import UserError

FEWEST = 4  # samples that are needed for two splits
TESTS = ("test", "validation", "valid", "val", "dev")  # splits of a dataset to test with, the first one there


@dataclass(frozen=True)
class Plan:
    """Which rows are for testing: those of a split that the table has, else those of the chosen groups."""

    parts: dict[str, str]  # the table's part of each split; the same one where it has no splits
    samples: int
    chosen: frozenset[bytes] = frozenset()
    shared: int = 0  # images that the table has in both of its own splits

    def split_of(self, part: str, row: Checked) -> str:
        """The split of a row of one of the table's parts."""
        if len(set(self.parts.values())) > 1:
            return "train" if part == self.parts["train"] else "test"
        return "test" if row.group in self.chosen else "train"

    def shared_images(self, table: Path) -> dict[str, str]:
        """A warning where training and test have images in common."""
        if not self.shared:
            return {}
        both = f"{self.shared} of the images or questions for testing are in training too"
        return {"shared_images": f"{both}, as {table} has its own splits; their scores say less about new images."}


def plan(rows: Rows, share: float, seed: int) -> Plan:
    """Check every row and draw about `share` of them to test with; raises UserError for data that cannot be used."""
    table = rows.table
    parts = _parts(table)
    groups: dict[str, Counter[bytes]] = {}
    for part in dict.fromkeys(parts.values()):
        groups[part] = Counter(row.group for row in rows.checked(part))
    samples = sum(count for part in groups.values() for count in part.values())
    if samples < FEWEST:
        raise UserError(f"{table.path} has {samples} samples; expected at least {FEWEST}, to train and to test with.")
    if len(groups) > 1:
        train, test = (groups[parts[split]] for split in ("train", "test"))
        if not train or not test:
            raise UserError(f"{table.path} has no sample in {parts['train' if not train else 'test']}. Add some.")
        return Plan(parts, samples, shared=len(train.keys() & test.keys()))
    return Plan(parts, samples, _test_groups(groups[parts["train"]], share, seed))


def _parts(table: Table) -> dict[str, str]:
    """The table's part for each split."""
    names = list(table.parts)
    if len(names) == 1:
        return {"train": names[0], "test": names[0]}
    if "train" not in names:
        raise UserError(f"{table.path} has the splits {', '.join(names)}; expected train, and one to test with.")
    return {"train": "train", "test": next((name for name in TESTS if name in names), "train")}


def _test_groups(groups: Counter[bytes], share: float, seed: int) -> frozenset[bytes]:
    """Groups with about the wanted share of the rows, so that no image is both in training and in test."""
    if len(groups) < 2:
        raise UserError("all samples show the same image; expected at least two images, one to train and one to test.")
    order = sorted(groups)
    random.Random(seed).shuffle(order)
    chosen: set[bytes] = set()
    taken, wanted = 0, share * groups.total()
    for key in order[:-1]:  # at least one image is left for training
        if chosen and taken >= wanted:
            break
        chosen.add(key)
        taken += groups[key]
    return frozenset(chosen)
