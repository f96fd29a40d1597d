"""L2P (arXiv 2112.08654): a pool of prompts with keys; a sample gets those whose keys are nearest to its query."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config.method import Choice
from pipeline.methods.base import Changes, InputOptions, Method


class L2POptions(InputOptions):
    """The pool, and the weight of the term that pulls keys to queries."""

    TRAINING_ONLY = frozenset({"init", "pull"})

    pool_size: int = Field(10, ge=1, description="M, prompts in the pool")
    pool_length: int = Field(5, ge=1, description="rows of each prompt")
    chosen: int = Field(5, ge=1, description="N, prompts that a sample gets, those of the nearest keys")
    pull: float = Field(0.1, ge=0, description="weight of the term that pulls keys to the queries they are chosen for")
    batch_vote: bool = Field(
        False, description="true: a batch's samples get the prompts that most of them chose, as in two public ports"
    )
    init: Literal["vocab_rows", "normal"] = Field("vocab_rows", description="where the prompts start")


class L2P(Method):
    """Prompts and keys are trained on in every stage, so answers to earlier tasks change."""

    Options = L2POptions
    part = "prompt_pool"
    terms: tuple[Choice, ...] = ("key_pull",)
    carries_prompt = True
    rule = "current"

    @property
    def changes_earlier(self) -> Changes:
        return "modules"
