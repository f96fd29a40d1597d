"""ModalPrompt: one set per task, earlier sets chosen by dual-modality similarity."""

from __future__ import annotations

from pydantic import Field

from pipeline.config.base import Section
from pipeline.config.method import Choice, RuleChoice
from pipeline.methods.base import Method, PromptOptions


class EarlierGate(Section):
    """A gate that a run had before another one was chosen: what was measured with it stays as it was."""

    stages: int = Field(ge=0, description="after so many stages and fewer the gate was this one, for training and rows")
    gate: float | None = Field(ge=0, description="see method.gate")


class ModalPromptOptions(PromptOptions):
    """One prompt set per stage, and which of them are inserted for a sample."""

    TRAINING_ONLY = PromptOptions.TRAINING_ONLY | {"prototype_weight", "earlier_gates"}

    k: int = Field(3, ge=1, description="most prompt sets inserted for one sample, 1 to the number of tasks")
    selection: RuleChoice = Field(
        "topk",
        description="which sets a sample gets. topk: the k most similar; all: every set, unselected; current: the "
        "newest; oracle: those of its own task (told, not routed); or another selection rule",
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

    def after(self, stages: int) -> ModalPromptOptions:
        """The method as it is after so many stages, with the gate of that time."""
        gates = [earlier.gate for earlier in self.earlier_gates if stages <= earlier.stages]
        return self.model_copy(update={"gate": gates[0] if gates else self.gate, "earlier_gates": ()})

    def with_gate(self, gate: float | None, stages: int) -> ModalPromptOptions:
        """The method with another gate from the stage behind the first `stages` on."""
        if gate == self.after(stages + 1).gate:
            return self
        kept = [earlier for earlier in self.earlier_gates if earlier.stages < stages]
        before = EarlierGate(stages=stages, gate=self.after(stages).gate)
        return self.model_copy(update={"gate": gate, "earlier_gates": (*kept, before)})


class ModalPrompt(Method):
    """Sets are chosen per sample by similarity, in training (the current one always included) and at inference.

    The other rules of `method.selection` are ablations: "all" inserts every set in the order of the stages, "current"
    only the newest one. "oracle" is told a sample's task and gives it what that task was trained with: its own set
    behind the k - 1 most similar earlier ones; it is the upper bound of routing.
    """

    Options = ModalPromptOptions
    learns_prototypes = True
    router = "prototype"

    @property
    def rule(self) -> Choice:
        selection: Choice = self.options.selection
        return selection
