"""The embedded tasks, generated from a seed in CoIN layout and read as any other data in that layout."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.sources.coin import CoinSplit
from data_prep.sources.coin_files import INSTRUCTIONS
from pipeline.errors import UserError
from pipeline.files.lock import lock_of, waiting_for

if TYPE_CHECKING:
    from pipeline.config.data import DataConfig, TaskConfig

STAMP = "GENERATED.txt"  # file in the root with generator version, seed and limit


class Generated(CoinSplit):
    """One split of an embedded task."""

    drawn = True

    @classmethod
    def draw(cls, data: DataConfig) -> None:
        draw(Path(data.root), data.seed, _common_limit(data.tasks), tuple(task.name for task in data.tasks))

    @classmethod
    def require_drawn(cls, data: DataConfig) -> None:
        if not (Path(data.root) / INSTRUCTIONS).is_dir():
            raise UserError(
                f"The data of this recipe are generated and not in {Path(data.root)} yet; one process draws them: "
                "`python -m pipeline prepare RECIPE`."
            )

    @classmethod
    def missing(cls, data: DataConfig, tasks: Sequence[TaskConfig]) -> list[str]:
        return []  # `prepare` draws them


def draw(root: Path, seed: int, limit: tuple[int, int] | None = None, tasks: Sequence[str] = ()) -> None:
    """Draw the embedded tasks into `root`, unless the same generator, seed and limit drew them before.

    Those that resemble the six are drawn where one of the `tasks` is none of the six. A drawing with them, or a larger
    one, which another recipe made there with this seed is kept. Raises UserError when `root` holds data that was not
    generated.

    Args:
        root: the folder.
        seed: of pictures and questions.
        limit: number of (training, test) samples per task; None draws all.
        tasks: names of the tasks that are wanted.
    """
    from data_prep.nano.tasks import (  # here: imports scikit-learn, which only this source needs
        TASKS,
        fingerprint,
        write_coin,
    )

    more = not set(tasks) <= set(TASKS)
    with waiting_for(lock_of(root), "the generated data"):
        said = (root / STAMP).read_text("utf-8").strip() if (root / STAMP).is_file() else ""
        match = re.search(r"train (\d+) test (\d+)$", said)
        there = (int(match.group(1)), int(match.group(2))) if match else (0, 0)
        more = more or said == fingerprint(seed, there, more=True)
        if limit is not None and said in (fingerprint(seed, there, more=more), fingerprint(seed, there)):
            # A larger drawing starts with the samples of a smaller one, so it serves both recipes.
            limit = (max(limit[0], there[0]), max(limit[1], there[1]))
        write_coin(root, seed, limit, more)  # does nothing where this drawing exists


def _common_limit(tasks: Sequence[TaskConfig]) -> tuple[int, int] | None:
    """Return the largest (train, test) limits over the tasks; None unless every task has both."""
    limits = [(task.limit_train, task.limit_test) for task in tasks]
    train, test = ([limit for limit in part if limit is not None] for part in zip(*limits, strict=True))
    return (max(train), max(test)) if len(train) == len(test) == len(limits) else None
