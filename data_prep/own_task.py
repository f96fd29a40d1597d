"""A task from the user's own data: converts a table of questions and answers, and its images, to CoIN layout.

The table is read twice, and no more of it is kept than a hash for each image and each question: first everything is
checked and the split is drawn, then images and entries are written.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from data_prep.answer_kinds import KINDS, kind_of
from data_prep.own_rows import Checked, Rows, reading_of
from data_prep.own_split import Plan
from data_prep.own_split import plan as draw
from data_prep.tables.open import Reading, open_table
from pipeline.config.base import NAME_LETTERS, NAME_PATTERN
from pipeline.config.task_file import TASK_FILE
from pipeline.errors import UserError, nearest, require_extras
from pipeline.files.atomic import remove_folder, sweep_temporaries, temporary_of, write_json
from pipeline.metrics.scoring import metric_names

SHOWN = 10  # samples on the sheet
Shown = tuple[str | None, str, str]  # image, question, answer


@dataclass(frozen=True)
class NewTask:
    """What a new task is called, and how its answers are scored.

    Args:
        name: name of the task.
        root: folder in CoIN layout that gets the task.
        metric: the task's metric.
        max_new_tokens: longest answer in tokens.
        test_share: share of the samples for the test split, where the table has no splits.
        seed: for the assignment of images to splits.
    """

    name: str
    root: Path
    metric: str = "exact_ci"
    max_new_tokens: int = 16
    test_share: float = 0.2
    seed: int = 0

    @property
    def folder(self) -> Path:
        """The folder of the task's text files."""
        return self.root / "instructions" / self.name

    @property
    def images(self) -> Path:
        """The folder of the task's images."""
        return self.root / "images" / self.name


def make_task(task: NewTask, images: Path | None, table: Path, reading: Reading | None = None) -> dict[str, Any]:
    """Write `root`/instructions/`name`/{train,test,task}.json, copies of the images, and a sheet of ten samples.

    The sheet has at least one of each kind of question that the table has.

    All samples of one image are in the same split; splits that a dataset comes with are kept. Raises UserError, or
    UserErrors with a message per line of the table, for data that cannot be used; nothing is written then.

    Args:
        task: the new task.
        images: folder at which the table's image paths start; None where images are in the table.
        table: file or dataset folder as `open_table` reads it.
        reading: how the table is read, as `reading_of` makes it; None: by its header alone.
    """
    _refuse_wrong(task)
    if images is not None and not images.is_dir():
        raise UserError(
            f"--images: '{images}' is no folder; expected the folder that the table's image paths start at."
        )
    require_extras("report")  # matplotlib, for the sheet; raised before anything is written
    rows = Rows(open_table(table, reading or reading_of()), images)
    plan = draw(rows, task.test_share, task.seed)
    sweep_temporaries(task.folder.parent)
    staged = temporary_of(task.folder)
    staged.mkdir(parents=True)
    try:
        written = _write(rows, task, plan, staged)
        write_json(
            staged / TASK_FILE, {"name": task.name, "metric": task.metric, "max_new_tokens": task.max_new_tokens}
        )
        staged.rename(task.folder)
    except BaseException:
        remove_folder(staged)
        raise
    from data_prep.sheet import draw_sheet  # here: matplotlib, which is slow to import, only for a table that is right

    shown = [(task.images / image if image else None, question, answer) for image, question, answer in written.sample()]
    return {
        "task": task.name,
        "root": str(task.root),
        "train": written.counts["train"],
        "test": written.counts["test"],
        "pictures": len(written.copied),
        "answers": len(written.answers),
        "questions": ", ".join(f"{kind} {written.kinds[kind]}" for kind in KINDS if written.kinds[kind]),
        "metric": task.metric,
        "sheet": str(draw_sheet(shown, task.root / "sheets" / f"{task.name}.png")),
        **plan.shared_images(table),
        **_long_answers(written, task.max_new_tokens),
    }


def _refuse_wrong(task: NewTask) -> None:
    if task.metric not in metric_names():
        known = ", ".join(metric_names())
        raise UserError(
            f"unknown metric '{task.metric}'; expected one of {known}.{nearest(task.metric, metric_names())}"
        )
    if not re.fullmatch(NAME_PATTERN, task.name):
        raise UserError(f"'{task.name}' cannot name a task; expected {NAME_LETTERS}.")
    if task.folder.exists():
        raise UserError(f"{task.folder} is there already; choose another name or --root, or remove that folder.")


@dataclass
class Written:
    """What has been written of a task."""

    counts: Counter[str] = field(default_factory=Counter)
    copied: set[str] = field(default_factory=set)
    answers: set[int] = field(default_factory=set)  # hashes
    shown: list[Shown] = field(default_factory=list)  # one from each tenth of the table
    kinds: Counter[str] = field(default_factory=Counter)
    first: dict[str, Shown] = field(default_factory=dict)  # the first one of each kind
    words: Counter[int] = field(default_factory=Counter)  # test answers by their number of words

    def sample(self) -> list[Shown]:
        """Up to SHOWN samples for the sheet: those of `shown`, some of which give way to kinds that are missing."""
        there = {kind_of(question, answer) for _, question, answer in self.shown}
        rare = [sample for kind, sample in self.first.items() if kind not in there]
        kept = list(self.shown)
        while rare and len(kept) + len(rare) > SHOWN:
            kinds = Counter(kind_of(question, answer) for _, question, answer in kept)
            kept.remove(max(reversed(kept), key=lambda sample: kinds[kind_of(*sample[1:])]))
        return [*kept, *rare]


def _write(rows: Rows, task: NewTask, plan: Plan, folder: Path) -> Written:
    """Write images and entries of all rows; the two arrays of entries are written one entry at a time."""
    done = Written()
    shown = _drawn(plan.samples, task.seed)
    with (
        (folder / "train.json").open("w", encoding="utf-8") as train,
        (folder / "test.json").open("w", encoding="utf-8") as test,
    ):
        files: dict[str, IO[str]] = {"train": train, "test": test}
        for part in dict.fromkeys(plan.parts.values()):
            for row in rows.checked(part):
                split = plan.split_of(part, row)
                number = done.counts.total()
                if row.image is not None and row.image not in done.copied:
                    _copy(row, task.images / row.image)
                    done.copied.add(row.image)
                entry = json.dumps(_entry(task.name, row, split), ensure_ascii=False)  # an entry a line
                files[split].write(("[" if not done.counts[split] else ",") + "\n" + entry)
                done.counts[split] += 1
                done.answers.add(hash(row.answer))
                if split == "test":
                    done.words[len(row.answer.split())] += 1
                sample, kind = (row.image, row.question, row.answer), kind_of(row.question, row.answer)
                done.kinds[kind] += 1
                done.first.setdefault(kind, sample)
                if number in shown:
                    done.shown.append(sample)
        for file in files.values():
            file.write("\n]\n")
    if done.counts.total() != plan.samples or not all(done.counts[split] for split in files):
        raise UserError(f"{rows.table.path} has changed while it was read; repeat the command when it is complete.")
    return done


def _drawn(samples: int, seed: int) -> set[int]:
    """Positions in a table for the sheet, one drawn from each of SHOWN equal parts.

    Positions at equal distances would meet one kind of question alone in a table that lists its kinds in turn.
    """
    generator = random.Random(seed)
    edges = [part * samples // SHOWN for part in range(SHOWN + 1)]
    return {generator.randrange(start, end) for start, end in itertools.pairwise(edges) if start < end}


def _copy(row: Checked, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(row.source, bytes):
        target.write_bytes(row.source)
    elif row.source is not None and not (target.exists() and target.samefile(row.source)):
        shutil.copyfile(row.source, target)


def _entry(name: str, row: Checked, split: str) -> dict[str, Any]:
    image = {} if row.image is None else {"image": f"images/{name}/{row.image}"}
    identity = f"{name}-{row.number}"
    if split == "test":
        return {"question_id": identity, **image, "text": row.question, "answer": row.answer}
    asked = f"<image>\n{row.question}" if image else row.question
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": row.answer}]
    return {"id": identity, **image, "conversations": turns}


def _long_answers(written: Written, most: int) -> dict[str, str]:
    """A warning about test answers of more than `most` tokens, counted in words, as a word has at least one token."""
    over = sum(count for words, count in written.words.items() if words > most)
    if not over:
        return {}
    return {
        "long_answers": (
            f"{over} of {written.counts['test']} test answers have more words than the {most} tokens of max_new_tokens "
            f"(the longest {max(written.words)} words), so they cannot be answered in full; set --max-new-tokens "
            "higher."
        )
    }
