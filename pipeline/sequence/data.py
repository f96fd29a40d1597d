"""The prepared data of a run: training, held-out and test samples of its tasks, with keys of the recipe's CLIP.

Test sets are opened only to score answers; choices such as the gate are made with held-out samples.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.config.data import DataConfig
from pipeline.config.recipe import Recipe
from pipeline.config.train import TrainConfig
from pipeline.data.grouped_order import GroupedOrder, image_groups
from pipeline.data.held_out import Rows, held_out_rows, other_rows
from pipeline.data.keys import Keys, PickedKeys
from pipeline.data.order import Order
from pipeline.data.sample import Sample
from pipeline.data.shards import IndexedShards
from pipeline.data.stage_data import StageData
from pipeline.data.stored_pictures import require_upright
from pipeline.errors import UserError
from pipeline.metrics.scoring import require_metrics
from pipeline.planning.too_long import Decision, decide
from pipeline.ranks.world import World, on_main, on_main_in_rounds, together
from pipeline.runs.data_use import data_record
from pipeline.sequence.prepared import refuse_other_data
from pipeline.sequence.test_set import TestSet

Part = tuple[IndexedShards, Keys | PickedKeys, int | None]  # samples of a task, their keys, the number used (None: all)


@dataclass(frozen=True)
class RunData:
    """The data of a run, one entry per task."""

    identity: dict[str, str]  # of the CLIP that made the keys
    train: list[Part]  # without held-out samples
    validation: list[Part]  # held-out samples; empty parts where the recipe holds none out
    most: int  # the largest number of samples per task that choices are made with
    scoring: list[TestSet] | None  # None where the data was opened without test sets
    skipped: list[dict[str, str]]  # bad records that `prepare` left out
    record: dict[str, Any] = field(default_factory=dict)  # for run.json: see `pipeline.runs.data_use`
    telling_rows: list[list[int]] = field(default_factory=list)  # rows of the longest training samples, by task
    left_out: dict[str, int] = field(default_factory=dict)  # number by task and split, see data.too_long

    @property
    def tests(self) -> list[TestSet]:
        """The test sets; RuntimeError where the data was opened without them."""
        if self.scoring is None:
            raise RuntimeError("test sets are for scoring alone, and this data was opened without them")
        return self.scoring

    def for_choices(self, task: int) -> tuple[Part, bool]:
        """The samples of a task that choices are made with, and whether these are held out.

        Training samples are used where there are no held-out ones: the recipe holds none out, or the task has too few.
        """
        held_out, (shards, keys, limit) = self.validation[task], self.train[task]
        if len(held_out[0]):
            return held_out, True
        ids = shards.ids[:limit]
        return _only((shards, keys, limit), held_out_rows(ids, 1.0, self.most)), False

    def fingerprints(self, tasks: list[int]) -> list[str]:
        """The fingerprints of the training data of these tasks."""
        return [self.train[task][0].fingerprint for task in tasks]

    def telling(self) -> list[Sample]:
        """The longest training samples and those with the largest images of each task, for the memory plan."""
        wholes = ((shards.whole(), rows) for (shards, *_), rows in zip(self.train, self.telling_rows, strict=True))
        return [whole[row] for whole, rows in wholes for row in rows]


def stage_order(train: TrainConfig, seed: int, index: int, data: StageData, by_image: bool) -> Order:
    """The order in which a stage's samples form batches.

    Args:
        train: the training settings: batch size, grouping by length or by image.
        seed: the run's seed; the order depends on it and the stage's number.
        index: the stage's number, 0-based.
        data: the stage's samples.
        by_image: whether questions about one image are grouped, because the model computes the image once for them.
    """
    together = train.questions_per_image if by_image else 1
    used = slice(None) if data.used is None else data.used
    order: Order
    if together == 1:
        lengths = data.lengths()[used] if train.length_buckets else None
        count = len(data) if data.used is None else len(data.used)
        order = Order(count, train.global_batch, seed, index, lengths)
    else:
        order = GroupedOrder(image_groups(data.keys)[used], together, train.global_batch, seed, index)
    order.rows = data.used
    return order


def open_data(
    recipe: Recipe, world: World, scoring: bool = False, each_round: Callable[[], object] = lambda: None
) -> RunData:
    """Open the data of a recipe on every rank.

    Args:
        recipe: the run's recipe.
        world: the ranks.
        scoring: open the test sets too.
        each_round: called by all ranks together every few seconds while rank 0 scans the samples.

    Raises:
        UserError: on all ranks, when data is missing or damaged on any.
    """

    def key_identity() -> dict[str, str]:
        from pipeline.backbones import clip  # imports transformers

        return clip.key_identity(*recipe.keys.source)

    identity = on_main(world, key_identity)
    on_main(world, lambda: refuse_other_data(recipe.data, recipe.run_path))

    def parts(split: str) -> list[Part]:
        # Only rank 0 reads the tables in full to verify their hashes; other ranks compare some blocks with rank 0's.
        verified: list[Part] = []
        marks = on_main(world, lambda: [shards.marks() for shards, *_ in _open(recipe.data, split, identity, verified)])

        def mine() -> list[Part]:
            if world.main:
                return verified
            found = _open(recipe.data, split, identity, [], check=False)
            for (shards, *_), expected in zip(found, marks, strict=True):
                _compare(shards, expected)
            return found

        return together(mine)

    train, test = parts("train"), parts("test") if scoring else []
    skipped = [record for shards, *_ in (*train, *test) for record in shards.description.get("skipped", [])]

    def decided() -> Decision | None:
        for shards, *_ in (*train, *test):
            require_upright(shards)
        opened = {"train": [part[0] for part in train], "test": [part[0] for part in test]}
        # Comparing keys needs no lengths.
        return decide(recipe.model, recipe.data, recipe.run_path, opened) if scoring else None

    # Rank 0 decides for all ranks: with another tokenizer version a rank could have another order of samples.
    decision = on_main_in_rounds(world, decided, each_round) or Decision({"train": [[] for _ in train], "test": []}, [])
    for (shards, *_), rows in zip(train, decision.left_out["train"], strict=True):
        shards.left_out = rows

    def tests() -> list[TestSet]:
        require_metrics([task.metric for task in recipe.data.tasks])
        return [
            TestSet(
                task.name, task.metric, task.max_new_tokens, StageData([part]), recipe.data.scoring, frozenset(rows)
            )
            for task, part, rows in zip(recipe.data.tasks, test, decision.left_out["test"], strict=True)
        ]

    tested = together(tests) if scoring else None
    splits = [(split, part) for split, parts_of in (("train", train), ("test", test)) for part in parts_of]
    names = [task.name for task in recipe.data.tasks] * (2 if scoring else 1)
    record = data_record(
        [(name, split, shards, limit) for name, (split, (shards, _, limit)) in zip(names, splits, strict=True)]
    )
    counts = decision.counts(recipe.data.tasks) if scoring else {}
    share, most = recipe.data.validation_share, recipe.data.validation_most
    divided = [_held_out(part, share, most) for part in train]
    kept, held_out = [kept for kept, _ in divided], [held for _, held in divided]
    return RunData(identity, kept, held_out, most, tested, skipped, record, decision.telling, counts)


def _held_out(part: Part, share: float, most: int) -> tuple[Part, Part]:
    """A task's training samples without the held-out ones, and the held-out ones; see `held_out_rows`.

    The limit of the part includes both.
    """
    shards, _, limit = part
    ids = shards.ids[:limit]
    rows = held_out_rows(ids, share, most) if share else np.empty(0, dtype=np.int64)
    return _only(part, other_rows(len(ids), rows)) if len(rows) else part, _only(part, rows)


def _only(part: Part, rows: Rows) -> Part:
    """The samples of a part at these rows."""
    shards, keys, _ = part
    return shards.only(rows), keys.only(rows), None


def _open(data: DataConfig, split: str, identity: dict[str, str], found: list[Part], check: bool = True) -> list[Part]:
    """Open one split of every task, append it to `found`, and return `found`."""
    for task in data.tasks:
        shards = IndexedShards(data.split_path(task.name, split), check)
        limit = task.limit_train if split == "train" else task.limit_test
        found.append((shards, shards.keys(identity), limit))
    return found


def _compare(shards: IndexedShards, expected: dict[str, str]) -> None:
    """Raise UserError where this rank's tables differ from rank 0's, which are verified."""
    for name, mark in shards.marks().items():
        if mark != expected[name]:
            raise UserError(
                f"{shards.folder / name} on {socket.gethostname()} is not the file that the first rank sees; expected "
                "the same prepared data on every machine. Copy the folder again, or put it on a shared file system."
            )
