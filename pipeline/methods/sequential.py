"""Sequential: one prompt set trained on and on, the measure of forgetting without any counter-measure."""

from __future__ import annotations

from pipeline.methods.base import Changes, Method


class Sequential(Method):
    """Each stage starts from the previous stage's set; the newest one answers every task."""

    carries_prompt = True
    rule = "current"

    @property
    def changes_earlier(self) -> Changes:
        return "modules"
