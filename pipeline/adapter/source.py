"""What questions are answered with: a pool of prompt sets, its tasks and its settings."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from pipeline.config.method import MethodOptions
from pipeline.config.models import KeysConfig, ModelConfig
from pipeline.config.unfamiliar import Unfamiliar
from pipeline.errors import UserError, nearest
from pipeline.methods import make_method
from pipeline.prompts.pool import PromptPool


@dataclass(frozen=True)
class Source:
    """The validated pool and settings of a run or an adapter, as `Answerer` needs them."""

    pool: PromptPool
    tasks: list[str]  # all tasks of the sequence; those of the pool come first
    method: MethodOptions
    model: ModelConfig
    keys: KeysConfig
    max_new_tokens: int
    repetition_penalty: float | str = "checkpoint"  # as `evaluate.repetition_penalty` of the run
    base_model: str = ""  # fingerprint of the frozen model

    def task_number(self, task: str | None) -> int:
        """Number of the named task; raises UserError for an unknown task, or where the method needs one."""
        names, needed = self.tasks, self._needs_task
        if task is None:
            if needed:
                title = make_method(self.method).title
                raise UserError(f"method {title} needs the task; set task (--task) to one of {', '.join(names)}.")
            return 0
        if task not in names:
            raise UserError(f"unknown task '{task}'; expected one of {', '.join(names)}.{nearest(task, names)}")
        number = names.index(task)
        if needed and number >= len(self.pool):
            known = ", ".join(self.pool.names)
            raise UserError(f"task '{task}' has no finished stage yet; expected one of {known}.")
        return number

    @functools.cached_property
    def _needs_task(self) -> bool:
        return make_method(self.method).needs_task

    @functools.cached_property
    def blind(self) -> str:
        """Why it cannot be told whether a question resembles a task, and what to do; "" where it can."""
        routing = make_method(self.method).routing
        if not routing.finds:
            return (
                f"method {make_method(self.method).title} does not choose sets by comparing a question with the tasks, "
                "so none is unfamiliar to it; expected it to be left out."
            )
        if routing.calibration(self.pool.states) is None:
            return (
                "these prompt sets keep no routing keys of their tasks, which a question would be compared with; "
                "expected those of a run that was trained with method.unfamiliar=flag, or with a router that keeps "
                "keys (docs/routing.md)."
            )
        return ""

    @property
    def unfamiliar(self) -> Unfamiliar | None:
        """What becomes of a question that resembles no task; None where that cannot be told."""
        return None if self.blind else make_method(self.method).routing.unfamiliar

    def require_sight(self, mode: Unfamiliar | None) -> None:
        """Raise UserError for a mode of `unfamiliar` that needs to tell whether a question resembles a task."""
        if mode not in (None, "answer") and self.blind:
            raise UserError(f"unfamiliar is '{mode}', but {self.blind}")

    def with_unfamiliar(self, mode: Unfamiliar | None) -> Source:
        """The same with another mode, which None leaves as it is; raises UserError as `require_sight` does."""
        self.require_sight(mode)
        if mode is None or not hasattr(self.method, "unfamiliar"):
            return self
        return replace(self, method=self.method.model_copy(update={"unfamiliar": mode}))
