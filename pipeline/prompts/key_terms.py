"""Terms of learned keys: pulled to the queries of the samples that they were chosen for, or kept orthogonal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field
from torch import Tensor

from pipeline.config.base import Section
from pipeline.prompts.terms import Step, Term, share_of

if TYPE_CHECKING:
    from pipeline.prompts.parts.base import Part
    from pipeline.prompts.parts.components import Components


class Pull(Section):
    """How much the term counts."""

    pull: float = Field(1.0, ge=0, description="weight of the term that pulls keys to the queries they are chosen for")


class KeyPull(Term):
    """The mean over samples of the sum over their chosen keys of 1 - cos(query, key)."""

    Options = Pull
    names = ("loss_keys",)

    @classmethod
    def of(cls, options: Pull) -> KeyPull:
        return cls(options.pull)

    def losses(self, step: Step) -> tuple[Tensor, ...]:
        part: Part = step.parts["module"]  # type: ignore[assignment]
        distances = part.key_distances(step.batch)  # [B]
        return ((distances * step.batch.weights).sum() / max(step.normaliser.samples, 1.0),)


class Ortho(Section):
    """How much the term counts."""

    ortho: float = Field(0.1, ge=0, description="weight of the term that keeps components orthogonal")


class Orthogonal(Term):
    """CODA's: the mean squared entries of X X^T - I for the keys, attentions and prefixes X of all components."""

    Options = Ortho
    names = ("loss_orthogonal",)

    @classmethod
    def of(cls, options: Ortho) -> Orthogonal:
        return cls(options.ortho)

    def losses(self, step: Step) -> tuple[Tensor, ...]:
        part: Components = step.parts["module"]  # type: ignore[assignment]
        return (part.orthogonality(step.bank) * share_of(step),)
