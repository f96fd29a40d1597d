"""Joint: one module trained on all tasks at once, no sequence and hence no forgetting."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.methods.base import Method, ReferenceOptions, Stage


class Joint(Method):
    """A single stage on the union of the tasks; its module answers every task."""

    Options = ReferenceOptions
    rule = "first"
    has_next_stage = False

    def stages(self, tasks: Sequence[str]) -> list[Stage]:
        return [Stage("joint", tuple(range(len(tasks))))]
