"""The section `method`: what is learned per task and which prompt sets are inserted."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config.base import Section


class EarlierGate(Section):
    """A gate that a run had before another one was chosen: what was measured with it stays as it was."""

    stages: int = Field(ge=0, description="after so many stages and fewer the gate was this one, for training and rows")
    gate: float | None = Field(ge=0, description="see method.gate")


class MethodConfig(Section):
    """What is learned per task and which sets are inserted."""

    name: Literal["modalprompt", "sequential", "independent", "joint", "zero_shot"] = Field(
        "modalprompt", description="the continual-learning method"
    )
    prompt_length: int = Field(10, ge=1, description="L, vectors per prompt set")
    init: Literal["vocab_rows", "normal", "previous"] = Field("vocab_rows", description="where a new prompt set starts")
    k: int = Field(3, ge=1, description="most prompt sets inserted for one sample, 1 to the number of tasks")
    selection: Literal["topk", "all", "current", "oracle"] = Field(
        "topk",
        description="which sets a sample gets: the k most similar; all, unselected; the newest; those of its own task "
        "(told, not routed)",
    )
    insertion: Literal["after_bos", "before_image", "after_image"] = Field(
        "after_bos",
        description="where sets stand: after the first token, directly before the image, or directly behind it, where "
        "what precedes them is computed without gradients and once for all questions about an image",
    )
    text_only: Literal["insert", "skip"] = Field(
        "insert", description="skip: questions without an image are answered without sets, as in the official code"
    )
    gate: float | None = Field(
        None,
        ge=0,
        description="insert a set only if its similarity is at least the best minus this; null: always k (paper)",
    )
    earlier_gates: tuple[EarlierGate, ...] = Field(
        (), description="the gates before it was changed, which `add --gate` writes here"
    )
    image_weight: float = Field(0.5, ge=0, le=1, description="share of the image in the similarity")
    prototype_weight: float = Field(1.0, ge=0, description="weight of the two prototype terms in the loss")

    def after(self, stages: int) -> MethodConfig:
        """The method as it is after so many stages, with the gate of that time."""
        gates = [earlier.gate for earlier in self.earlier_gates if stages <= earlier.stages]
        return self.model_copy(update={"gate": gates[0] if gates else self.gate, "earlier_gates": ()})

    def with_gate(self, gate: float | None, stages: int) -> MethodConfig:
        """The method with another gate from the stage behind the first `stages` on."""
        if gate == self.after(stages + 1).gate:
            return self
        kept = [earlier for earlier in self.earlier_gates if earlier.stages < stages]
        before = EarlierGate(stages=stages, gate=self.after(stages).gate)
        return self.model_copy(update={"gate": gate, "earlier_gates": (*kept, before)})
