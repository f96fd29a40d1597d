"""DualPrompt (arXiv 2204.04799): prefixes that all tasks share, and prefixes of each task, found by a learned key."""

from __future__ import annotations

from pydantic import Field

from pipeline.config.dual_prefix import DualPrefixOptions
from pipeline.config.method import Choice, RoutedOptions, RouterChoice, RuleChoice
from pipeline.methods.base import Method


class DualPromptOptions(RoutedOptions, DualPrefixOptions):
    """Lengths and layers of both kinds of prefixes, and how the task of a sample is recognised."""

    TRAINING_ONLY = frozenset({"init", "pull", "freeze_g_after_first"})

    pull: float = Field(
        1.0, ge=0, description="weight of the term that pulls a task's key to the queries of its samples"
    )
    router: RouterChoice = Field("key", description="how the task of a sample is recognised")
    rule: RuleChoice = Field("hard", description="hard: the prefixes of the most similar task; or another rule")


class DualPrompt(Method):
    """A task's prefixes are trained alone; the shared ones in every stage, unless they are frozen after the first."""

    Options = DualPromptOptions
    part = "dual_prefix"
    terms: tuple[Choice, ...] = ("key_pull",)
