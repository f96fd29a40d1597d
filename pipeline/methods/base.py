"""What distinguishes the methods: their stages, what a stage starts from, how samples come to modules, and the loss.

A method is a declaration. This package imports no torch, so that a recipe is checked and a report is drawn without it;
routers and rules are named, and loaded when they are used.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from pipeline.config import registry
from pipeline.config.method import Choice, MethodOptions, PartChoice, choice_name

if TYPE_CHECKING:
    from pipeline.prompts.routing import Routing

Changes = Literal["nothing", "answers", "modules"]


@dataclass(frozen=True)
class Stage:
    """One training: its name, which the module gets too, and the numbers of the tasks trained on."""

    name: str
    tasks: tuple[int, ...]


class InputOptions(MethodOptions):
    """How the frozen model is asked."""

    insertion: Literal["after_bos", "before_image", "after_image"] = Field(
        "after_bos",
        description="where sets stand: after the first token, directly before the image, or directly behind it, where "
        "what precedes them is computed without gradients and once for all questions about an image",
    )


class PromptOptions(InputOptions):
    """One prompt set per stage, which counts alone."""

    TRAINING_ONLY = frozenset({"init"})

    prompt_length: int = Field(10, ge=1, description="L, vectors per prompt set")
    init: Literal["vocab_rows", "normal", "previous"] = Field("vocab_rows", description="where a new prompt set starts")
    text_only: Literal["insert", "skip"] = Field(
        "insert", description="skip: questions without an image are answered without sets, as in the official code"
    )


class ReferenceOptions(PromptOptions):
    """One module per stage of any kind of part; those of prompts below are for `part: input_rows` alone."""

    part: PartChoice = Field(
        "input_rows",
        description="what a stage learns: input_rows (a prompt set), low_rank (a LoRA) or another part, with its own "
        "options, such as {name: low_rank, rank: 8}",
    )

    @model_validator(mode="after")
    def _of_rows_alone(self) -> ReferenceOptions:
        part = choice_name(self.part)
        fields = PromptOptions.model_fields
        changed = [
            name
            for name in ("prompt_length", "init", "insertion")
            if part != "input_rows" and getattr(self, name) != fields[name].default
        ]
        if changed:
            raise ValueError(
                f"{' and '.join(changed)} are options of the part input_rows, and the part is {part}; expected its own "
                f"options beside its name, such as part: {{name: {part}, ...}}"
            )
        return self


class Method:
    """A way to learn and use modules; the default is one of its own per stage, trained alone.

    A method of another package derives from this, with `Options`, `rule` and where it routes `router`, each a name of
    `pipeline.config.registry` or a property that gives one by the options.
    """

    Options: ClassVar[type[MethodOptions]] = PromptOptions
    learns_prototypes: ClassVar[bool] = False  # whether the router's state is learned with the module
    carries_prompt: ClassVar[bool] = False  # whether a stage goes on from the module of the stage before
    has_next_stage: ClassVar[bool] = True  # whether a finished run can learn one more task
    sized_by: ClassVar[str] = ""  # the option that a budget of trained values sets, where it is not the part's own

    def __init__(self, options: Any) -> None:
        """`options` is an instance of the class's own `Options`."""
        self.options = options

    @property
    def name(self) -> str:
        """What recipes name it by."""
        return str(self.options.name)

    @property
    def part(self) -> Choice | None:
        """What a stage learns; None: nothing."""
        chosen: Choice = getattr(self.options, "part", "input_rows")
        return chosen

    @property
    def terms(self) -> tuple[Choice, ...]:
        """Additions to the loss, beside those of a learned router."""
        return ()

    @property
    def router(self) -> Choice | None:
        """How the task of a sample is recognised: as the option `router` says; None where it is not."""
        choice: Choice | None = getattr(self.options, "router", None)
        return choice

    @property
    def rule(self) -> Choice:
        """Which modules a sample gets: as the option `rule` says."""
        choice: Choice | None = getattr(self.options, "rule", None)
        if choice is None:
            raise NotImplementedError(f"the method {self.name} has neither an option nor a property `rule`")
        return choice

    @property
    def changes_earlier(self) -> Changes:
        """What a stage changes of earlier tasks: their modules, only their answers, or nothing but the routing.

        A new module may always be chosen for a sample of an earlier task; that is not meant here.
        """
        if (
            self.has_next_stage
            and self.part is not None
            and registry.load("parts", choice_name(self.part)).changes_shared(self)
        ):
            return "modules"
        return "answers" if self.routing.rule.uses_later else "nothing"

    @property
    def needs_task(self) -> bool:
        """Whether a sample's task has to be told at inference, rather than found by routing."""
        return self.routing.rule.needs_task

    @property
    def title(self) -> str:
        """What a message calls this way of choosing modules."""
        chosen = getattr(self.options, "selection", None)
        return self.name if chosen is None else f"selection {choice_name(chosen)}"

    @property
    def skips_text(self) -> bool:
        """Whether a question without an image is answered without modules."""
        return bool(getattr(self.options, "text_only", "insert") == "skip")

    @property
    def insertion(self) -> str:
        """Where prompt sets stand in the sequence."""
        return str(getattr(self.options, "insertion", "after_bos"))

    @property
    def prompt_length(self) -> int:
        """Vectors that one module inserts into the sequence."""
        return int(getattr(self.options, "prompt_length", 0))

    @property
    def init(self) -> str:
        """Where a new module starts from."""
        return str(getattr(self.options, "init", "vocab_rows"))

    @property
    def prototype_weight(self) -> float:
        """Weight of the two prototype terms in the loss."""
        return float(getattr(self.options, "prototype_weight", 0.0))

    @functools.cached_property
    def routing(self) -> Routing:
        """The router and the rule, ready to be asked."""
        # By name, because they import torch.
        made: Routing = importlib.import_module("pipeline.prompts.routing").routing_of(self)
        return made

    def stages(self, tasks: Sequence[str]) -> list[Stage]:
        """The stages of a sequence over these tasks, in order."""
        return [Stage(name, (index,)) for index, name in enumerate(tasks)]
