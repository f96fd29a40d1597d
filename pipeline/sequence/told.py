"""The answers to a test set had its task been told: routed ones, and new ones where routing took another set."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from pipeline.data.selection import Selection
from pipeline.prompts.pool import PromptPool, tensor_fingerprint
from pipeline.prompts.routing import Routed
from pipeline.sequence.answers import UNFINISHED_FILE, AnswerStore, TaskAnswers
from pipeline.sequence.answers import AnswerKey as AnswerKey  # the type of a field that ToldStore inherits, for pdoc
from pipeline.sequence.test_set import TestSet


@dataclass(frozen=True)
class ToldStore(AnswerStore):
    """The folder of answers with the task told; `earlier` has the folder of the routed ones, which are reused.

    Only samples whose modules differ from the routed ones are written, so the folder is as small as routing is good.
    """

    routed: Callable[[], Selection] | None = None  # asked on rank 0 alone
    routed_folder: Path = Path()

    def task(self, test: TestSet, pool: PromptPool, routed: Routed) -> ToldAnswers:
        """The answers to a test set; `routed` has the modules with the task told."""
        return ToldAnswers(self, test, pool, routed)

    def remove(self, task: str) -> None:
        """Remove the files of a task that routing and telling answer alike."""
        for name in (f"{task}.jsonl", f"{task}.score.json", UNFINISHED_FILE.format(task)):
            (self.folder / name).unlink(missing_ok=True)


class ToldAnswers(TaskAnswers):
    """The answers to one test set with its task told, on rank 0. Files have those that differ from the routed ones."""

    def __init__(self, store: ToldStore, test: TestSet, pool: PromptPool, told: Routed) -> None:
        super().__init__(store, test, pool, told)
        if store.routed is None:
            raise ValueError("a store of told answers needs the routed selection")
        self._changed: Tensor = told.selection.differs(store.routed())  # [N] bool
        self._routed_score = store.routed_folder / f"{test.name}.score.json"

    @functools.cached_property
    def _written(self) -> Collection[int]:
        return dict.fromkeys(self._changed.nonzero()[:, 0].tolist())

    def _sources(self) -> Iterable[Sequence[Path]]:
        """Folder by folder: most answers are the routed ones, and each of hundreds of stages has a folder."""
        return ([folder] for folder in (self._folder, *self._earlier))

    @functools.cached_property
    def _identity(self) -> str:
        """Also of the routed predictions, most of which the score is made of."""
        routed = json.loads(self._routed_score.read_text("utf-8"))
        facts = [super()._identity, tensor_fingerprint(self._changed), routed["identity"], routed["predictions"]]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
