"""A data format: `<root>/<task>/{train,test}.jsonl`, one question a line, with the images in `<root>/<task>/images`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from data_prep.bad_records import BadRecord
from data_prep.sources.base import Entry, SourceSplit
from pipeline.errors import UserError


class JsonlFolder(SourceSplit):
    """Lines `{"id": "7", "image": "cat.png", "question": "...", "answer": "..."}`; `image` may be missing."""

    @classmethod
    def task_folder(cls, root: Path, task: str) -> Path:
        return root / task

    @cached_property
    def text_files(self) -> list[Path]:
        if self.files or self.annotations:
            raise UserError(f"Task {self.task}: the format jsonl_folder has no train_files, test_files or annotations.")
        path = self.task_folder(self.root, self.task) / f"{self.split}.jsonl"
        if not path.is_file():
            raise UserError(f"{path} does not exist; expected one question a line. Put it there, or set data.root.")
        return [path]

    def entries(self) -> Iterator[Entry | BadRecord]:
        (path,) = self.text_files
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            try:
                yield self._entry(path, number, json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                yield BadRecord(str(path), f"line {number}", f"found {line[:80]!r} ({error!r}); expected one object.")

    def _entry(self, path: Path, number: int, row: dict[str, str]) -> Entry:
        image = f"{self.task}/images/{row['image']}" if row.get("image") else None
        question, answer = str(row["question"]), str(row["answer"]).strip()
        if not answer:
            raise ValueError("the answer is empty")
        return Entry(str(path), f"line {number}", str(row["id"]), image, question, answer, {})
