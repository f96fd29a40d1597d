"""The files of a run's stages in its folder: finished stages, and the checkpoints of the stage in progress."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.files.atomic import remove_folder
from pipeline.methods import Stage
from pipeline.prompts.stage_files import (
    StageCheckpoint,
    load_stage,
    save_stage,
    start_stage_folder,
    without_kept_keys,
)
from pipeline.ranks.world import on_main
from pipeline.runs.attempts import NUMBER, Attempt, complete_replacement, finished_meta, put_aside
from pipeline.runs.claim import check_stage
from pipeline.runs.layout import METRICS, after_folder, ahead_folder, stage_folder, told_folder, unfinished_folder
from pipeline.runs.replacement import finish_replacement
from pipeline.runs.session import Session
from pipeline.training.resume import StepState, cut_log, newest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageFiles:
    """Reads and writes the files of stages; UserError when they are damaged or made with other models or other data.

    `data` are name and fingerprint of every task's training samples, `constants` the fingerprints of the models by
    name. A stage's meta.json has to match both. `attempt` is the newest one at the last stage: the finished stage that
    it replaces counts as one to be trained, and stays until the new one is whole.
    """

    session: Session
    data: Sequence[tuple[str, str]]
    constants: Mapping[str, Any]
    attempt: Attempt | None = None

    def expected(self, stage: Stage) -> dict[str, Any]:
        """The fingerprints of models and data that a stage's meta.json has to match."""
        return {**self.constants, "data": dict(self.data[task] for task in stage.tasks)}

    def load(self, index: int, stage: Stage) -> StageCheckpoint | None:
        """A finished stage, read by this rank; None when it has to be trained. `index` is 0-based."""
        attempt = self._attempt(index)
        if attempt is not None:
            complete_replacement(self.session.path, index, stage.name)
            meta = finished_meta(self.session.path, index, stage.name)
            if meta is not None and attempt.replaces(meta):
                return None
        checkpoint = load_stage(self.session.path, index, stage.name)
        if checkpoint is not None:
            check_stage(stage_folder(self.session.path, index, stage.name), checkpoint.meta, self.expected(stage))
        return checkpoint

    def restore(self, index: int, stage: Stage) -> StageCheckpoint | None:
        """`load` on rank 0, broadcast to all ranks, which call it together.

        The others get it without the kept routing keys: rank 0 routes for all, and a thousand tasks have 0.4 GB.
        """
        whole: StageCheckpoint | None = None

        def read() -> StageCheckpoint | None:
            nonlocal whole
            whole = self.load(index, stage)
            return None if whole is None else StageCheckpoint(without_kept_keys(whole.tensors), whole.meta)

        found = on_main(self.session.world, read)
        return whole if self.session.world.main else found

    def begin(self, index: int, stage: Stage, begun: Mapping[str, Any]) -> StepState | None:
        """The newest checkpoint of an unfinished stage, None where it starts from the beginning; for rank 0.

        A checkpoint must have the steps, earlier sets and attempt of `begun`. Without such a checkpoint the folder of
        the earlier attempt is removed, and so are evaluations with sets that will be replaced, but for those of a
        finished stage that `save` puts aside.
        """
        path = self.session.path
        folder = self.unfinished(index, stage)
        found = newest(folder)
        if found is not None:
            check_stage(folder, found.meta, self.expected(stage))
            if all(found.meta.get(name) == begun.get(name) for name in ("earlier_sets", "steps", NUMBER)):
                cut_log(folder / METRICS, found.step)
                return found
            if found.meta.get(NUMBER) == begun.get(NUMBER):
                log.warning("%s was begun after other earlier stages than there are now; it begins anew.", folder)
        tasks = range(max(stage.tasks) + 1, len(self.data) + 1)
        for number in tasks if self._attempt(index) is None else ():
            for answers in (after_folder(path, number), told_folder(path, number), ahead_folder(path, number + 1)):
                shutil.rmtree(answers, ignore_errors=True)
        start_stage_folder(path, index, stage.name)
        return None

    def unfinished(self, index: int, stage: Stage) -> Path:
        """The folder of a stage in progress."""
        return unfinished_folder(self.session.path, index, stage.name)

    def save(self, index: int, stage: Stage, values: dict[str, Tensor], facts: Mapping[str, Any]) -> Path:
        """Finish a stage with its trained values and `facts` for its meta.json; returns its folder.

        All ranks call it together, rank 0 writes.
        """
        session, meta, attempt = self.session, {**self.expected(stage), **facts}, self._attempt(index)

        def replace(former: Path) -> None:
            if attempt is None:
                remove_folder(former)
            else:
                put_aside(session.path, index + 1, stage.name, attempt.former)

        return on_main(session.world, lambda: save_stage(session.path, index, stage.name, values, meta, replace))

    def rewrite(self, index: int, stage: Stage, checkpoint: StageCheckpoint) -> None:
        """Write a finished stage's folder anew, atomically, with the log of its training; for rank 0."""
        path = self.session.path
        work = start_stage_folder(path, index, stage.name)
        log_file = stage_folder(path, index, stage.name) / METRICS
        if log_file.is_file():
            shutil.copy2(log_file, work / METRICS)
        meta = {name: value for name, value in checkpoint.meta.items() if name not in ("format", "sha256")}
        save_stage(path, index, stage.name, checkpoint.tensors, meta)

    def finish_rewrites(self, stages: Sequence[Stage]) -> None:
        """Complete a `rewrite` in which the process was killed between its two renames; for rank 0."""
        path = self.session.path
        for index, stage in enumerate(stages):
            finish_replacement(unfinished_folder(path, index, stage.name), stage_folder(path, index, stage.name))

    def attempt_facts(self, index: int) -> dict[str, Any]:
        """What checkpoints and meta.json of a stage say of the attempt; {} for the first one."""
        attempt = self._attempt(index)
        return {} if attempt is None else attempt.facts

    def _attempt(self, index: int) -> Attempt | None:
        return self.attempt if self.attempt is not None and self.attempt.is_of(index) else None
