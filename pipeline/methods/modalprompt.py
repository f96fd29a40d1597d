"""ModalPrompt: one set per task, earlier sets chosen by dual-modality similarity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, model_validator

from pipeline.config.base import Section
from pipeline.config.method import BOTH_BOUNDS, Choice, RoutedOptions, RouterChoice, RuleChoice, choice_name
from pipeline.errors import UserError
from pipeline.methods.base import Method, PromptOptions


class EarlierGate(Section):
    """A gate or share that a run had before another one was chosen: what was measured with it stays as it was."""

    stages: int = Field(ge=0, description="after so many stages and fewer it was this one, for training and rows")
    gate: float | None = Field(ge=0, description="see method.gate")
    share: float | None = Field(None, gt=0, le=1, description="see method.share")


class ModalPromptOptions(PromptOptions, RoutedOptions):
    """One prompt set per stage, and which of them are inserted for a sample."""

    TRAINING_ONLY = frozenset({"prototype_weight", "earlier_gates"})
    FORMERLY: ClassVar[dict[str, Any]] = {"router": "prototype"}  # the only router that there was

    k: int = Field(3, ge=1, description="most prompt sets inserted for one sample, 1 to the number of tasks")
    selection: RuleChoice = Field(
        "topk",
        description="which sets a sample gets. topk: the k most similar; all: every set, unselected; current: the "
        "newest; oracle: those of its own task (told, not routed); or another selection rule",
    )
    router: RouterChoice = Field(
        "random_ridge",
        description="how the task of a sample is recognised. random_ridge, ridge: by a regression on a sample of the "
        "tasks' keys; prototype: by a vector that a head learns (paper); mean, centres; or another router",
    )
    gate: float | None = Field(
        None,
        ge=0,
        description="insert a set only if its similarity is at least the best minus this; null: always k (paper)",
    )
    share: float | None = Field(
        None,
        gt=0,
        le=1,
        description="insert a set only if its task is at least this share as probable as the most probable one, which "
        "means the same for every router; null: as gate says",
    )
    earlier_gates: tuple[EarlierGate, ...] = Field(
        (),
        description="gate and share before they were changed, which `add --gate` and `add --share` write here",
    )
    image_weight: float = Field(0.5, ge=0, le=1, description="share of the image in the similarity")
    prototype_weight: float = Field(1.0, ge=0, description="weight of the two prototype terms in the loss")

    def after(self, stages: int) -> ModalPromptOptions:
        """The method as it is after so many stages, with the gate or share of that time."""
        then = next((earlier for earlier in self.earlier_gates if stages <= earlier.stages), self)
        return self.model_copy(update={"gate": then.gate, "share": then.share, "earlier_gates": ()})

    @model_validator(mode="after")
    def _one_bound(self) -> ModalPromptOptions:
        if self.gate is not None and self.share is not None:
            raise ValueError(BOTH_BOUNDS)
        return self

    def changed(self, changes: Mapping[str, Any], stages: int) -> ModalPromptOptions:
        """The method with another gate or share, which takes the place of both, behind the first `stages` stages."""
        if not changes:
            return self
        new = {"gate": None, "share": None, **changes}
        if None not in new.values():
            raise UserError(f"--gate and --share are given; {BOTH_BOUNDS.rpartition(',')[0]}.")
        now, before = self.after(stages + 1), self.after(stages)
        if (now.gate, now.share) == (new["gate"], new["share"]):
            return self
        kept = [earlier for earlier in self.earlier_gates if earlier.stages < stages]
        kept.append(EarlierGate(stages=stages, gate=before.gate, share=before.share))
        return self.model_copy(update={**new, "earlier_gates": tuple(kept)})


class ModalPrompt(Method):
    """Sets are chosen per sample by similarity, in training (the current one always included) and at inference.

    The other rules of `method.selection` are ablations: "all" inserts every set in the order of the stages, "current"
    only the newest one. "oracle" is told a sample's task and gives it what that task was trained with: its own set
    behind the k - 1 most similar earlier ones; it is the upper bound of routing.
    """

    Options = ModalPromptOptions

    @property
    def learns_prototypes(self) -> bool:  # type: ignore[override]
        return choice_name(self.options.router) == "prototype"

    @property
    def rule(self) -> Choice:
        selection: Choice = self.options.selection
        return selection
