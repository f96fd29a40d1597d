"""Independent: one set per task and the task known at inference, the upper bound for routing."""

from __future__ import annotations

from pipeline.methods.base import Method


class Independent(Method):
    """Every set is trained alone; a sample of task i gets set i."""

    rule = "own"
