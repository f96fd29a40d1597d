"""Independent: one module per task and the task known at inference, the upper bound for routing."""

from __future__ import annotations

from pipeline.methods.base import Method, ReferenceOptions


class Independent(Method):
    """Every module is trained alone; a sample of task i gets module i."""

    Options = ReferenceOptions
    rule = "own"
