"""The options of DualPrompt's two kinds of prefixes, which the part and the method have."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config.base import Section

# Lengths of the general and of the task's prefixes in two public ports, which disagree.
PRESETS = {"l2p_pytorch": (5, 5), "coda": (6, 20)}


class DualPrefixOptions(Section):
    """Lengths and layers of the two kinds of prefixes of DualPrompt."""

    preset: Literal["l2p_pytorch", "coda"] = Field(
        "l2p_pytorch",
        description="the lengths that are not given: l2p_pytorch 5 and 5, coda 6 and 20, as in two public ports",
    )
    general_length: int | None = Field(
        None, ge=1, description="keys and values that all tasks share; null: the preset's"
    )
    task_length: int | None = Field(None, ge=1, description="keys and values of a task; null: the preset's")
    general_layers: tuple[int, ...] | None = Field(
        None, description="layers with the shared ones; null: the first sixth, as 0 and 1 of 12; []: none"
    )
    task_layers: tuple[int, ...] | None = Field(
        None, min_length=1, description="layers with the task's; null: from there to 5/12, as 2 to 4 of 12"
    )
    freeze_g_after_first: bool = Field(
        False, description="true: the shared ones are trained in the first stage alone, so that nothing earlier changes"
    )
    init: Literal["vocab_rows", "normal"] = Field(
        "vocab_rows", description="where prefixes start: the frozen model's own keys and values of words; or normal"
    )

    @property
    def lengths(self) -> tuple[int, int]:
        """Of the shared prefixes and of a task's."""
        general, task = PRESETS[self.preset]
        return self.general_length or general, self.task_length or task
