"""Reads tasks in CoIN layout: `<root>/instructions/<Task>/{train,test}.json`, image paths relative to `<root>`.

A record that cannot be used (an answer or image missing, an id used twice, ...) is yielded as a `BadRecord` in its
place; a file that cannot be read raises UserError. Formats: docs/own_data.md.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.bad_records import BadRecord, Tolerance
from data_prep.sources.addresses import BenchmarkDownload, benchmark_of, images_of
from data_prep.sources.annotations import read_annotations
from data_prep.sources.base import Entry, SourceSplit, UnusableError
from data_prep.sources.coin_entries import read_entry, record_name
from data_prep.sources.coin_files import IMAGE_ROOTS, INSTRUCTIONS, annotation_file, split_files
from data_prep.sources.text_files import read_json
from pipeline.data.sample import Sample
from pipeline.errors import UserError
from pipeline.files.paths import command

if TYPE_CHECKING:
    from pipeline.config.data import DataConfig, TaskConfig


class CoinSplit(SourceSplit):
    """One split of one task in CoIN layout."""

    image_folders = IMAGE_ROOTS

    @classmethod
    def task_folder(cls, root: Path, task: str) -> Path:
        return root / INSTRUCTIONS / task

    @cached_property
    def text_files(self) -> list[Path]:
        return [*self._paths, *([self._annotation_path] if self._annotation_path else [])]

    def entries(self) -> Iterator[Entry | BadRecord]:
        known = read_annotations(self._annotation_path) if self._annotation_path else None
        for path in self._paths:
            file = str(path)
            for number, raw in enumerate(_read(path)):
                try:
                    yield read_entry(raw, file, number, known)
                except UnusableError as error:
                    yield BadRecord(file, record_name(raw, number), str(error))

    @classmethod
    def missing(cls, data: DataConfig, tasks: Sequence[TaskConfig]) -> list[str]:
        """With the download locations of a published benchmark, recognised by the names of its tasks."""
        root, benchmark = Path(data.root), benchmark_of(task.name for task in data.tasks)
        absent = [task.name for task in tasks if not cls.task_folder(root, task.name).is_dir()]
        wrong = [_instructions_missing(root, absent, benchmark)] if absent else []
        return [*wrong, *(sentence for name in absent if (sentence := cls.fetching(data, name)))]

    @classmethod
    def fetching(cls, data: DataConfig, task: str) -> str | None:
        images = images_of(benchmark_of(known.name for known in data.tasks), task)
        where = Path(data.root) / "datasets"
        return None if images is None else f"{task}: download its images from {images}; they belong under {where}."

    @cached_property
    def _paths(self) -> list[Path]:
        return split_files(self.root, self.task, self.split, self.files)

    @cached_property
    def _annotation_path(self) -> Path | None:
        return annotation_file(self.root, self.task, self.annotations) if self.split == "test" else None


def read_task(
    root: str | os.PathLike[str], task: str, split: str, limit: int | None = None, start: int = 0, workers: int = 1
) -> Iterator[Sample]:
    """Yield the samples of one task and split, from the `start`-th record on, at most the first `limit` records.

    Raises UserError that names file and record of the first one that cannot be used.
    """
    tolerance = Tolerance(0)
    for record in CoinSplit(Path(root), task, split, limit).records(start, workers):
        if isinstance(record, BadRecord):
            tolerance.skip(record)
        else:
            yield record


def _read(path: Path) -> list[Any]:
    content = read_json(path, "an array of entries")
    if not isinstance(content, list) or not content:
        found = "an empty array" if content == [] else type(content).__name__
        raise UserError(f"{path} holds {found}; expected a JSON array with at least one entry. Restore the file.")
    return content


def _instructions_missing(root: Path, tasks: list[str], benchmark: BenchmarkDownload | None) -> str:
    files = ", ".join(f"{INSTRUCTIONS}/{task}" for task in tasks)
    found = f"'{root}' has no" if root.is_dir() else f"the folder '{root}' does not exist; it should hold"
    sentence = f"data.root: {found} {files}, {'each ' * (len(tasks) > 1)}with train.json and test.json."
    if benchmark is None:
        made = command("new-task", tasks[0], "--images", "FOLDER", "--samples", "TABLE", "--root", root)
        return f"{sentence} `{made}` writes them of a table and images; or set data.root to the folder that has them."
    folder = f"folder {benchmark.folder} of " if benchmark.folder else ""
    only = f" --include '{benchmark.folder}/*'" if benchmark.folder else ""
    rename = f" and rename {benchmark.folder} to instructions" if benchmark.folder else ""
    return (
        f"{sentence} `python -m data_prep download {benchmark.name.lower()} --root {root}` fetches them, and of the "
        f"images what needs no account. By hand they are the {folder}https://huggingface.co/datasets/"
        f"{benchmark.repository}: run `hf download {benchmark.repository} --repo-type dataset{only} --local-dir {root}`"
        f"{rename}; or set data.root to the folder that has them."
    )
