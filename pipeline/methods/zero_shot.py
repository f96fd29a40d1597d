"""Zero-shot: the frozen model as it is, the lower bound."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.methods.base import InputOptions, Method, Stage


class ZeroShot(Method):
    """No stage and no set."""

    part = None
    Options = InputOptions
    rule = "none"
    has_next_stage = False

    def stages(self, tasks: Sequence[str]) -> list[Stage]:
        return []
