"""Sequential: one module trained on and on, the measure of forgetting without any counter-measure."""

from __future__ import annotations

from pipeline.methods.base import Changes, Method, ReferenceOptions


class Sequential(Method):
    """Each stage starts from the previous stage's module; the newest one answers every task."""

    Options = ReferenceOptions
    carries_prompt = True
    rule = "current"

    @property
    def changes_earlier(self) -> Changes:
        return "modules"
