"""Further terms of the loss, beside the language model's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from pipeline.config import registry
from pipeline.config.base import Section
from pipeline.config.method import Choice, choice_name, chosen_options
from pipeline.prompts.routers.mean import prototype_term_weights

if TYPE_CHECKING:
    from pipeline.data.collate import Batch
    from pipeline.training.normaliser import Normaliser


@dataclass(frozen=True)
class Step:
    """One micro-batch of a step, as a term sees it."""

    parts: nn.ModuleDict  # the learner's
    bank: Mapping[str, Tensor]  # what earlier stages left, by name; see `Learner`
    batch: Batch
    normaliser: Normaliser
    logits: Tensor  # [n, V] float32, of the answers' tokens; one row of weight 0 where there is none
    weights: Tensor  # [n] of these tokens' samples
    # Computes the same logits [n, V] with what the stage before left alone, without gradients; None in the first stage.
    before: Callable[[], Tensor | None]


class Weight(Section):
    """How much a term counts."""

    weight: float = Field(1.0, ge=0, description="factor of the term in the loss")


class Term:
    """An addition to the loss: the sum of what `losses` gives, times `weight`; see `pipeline.config.registry`, terms.

    `Options` are what a method may say: fields of the same names in its options are handed to the term.
    """

    Options: ClassVar[type[Section]] = Weight
    names: ClassVar[tuple[str, ...]]
    uses_bank: ClassVar[bool] = False  # whether it looks at all earlier modules, also where the rule selects none
    uses_previous: ClassVar[bool] = False  # whether it asks for `Step.before`

    def __init__(self, weight: float) -> None:
        self.weight = weight

    @classmethod
    def of(cls, options: Any) -> Term:
        """The term with its own options."""
        return cls(options.weight)

    def losses(self, step: Step) -> tuple[Tensor, ...]:
        """This micro-batch's share of each of the `names`.

        The same modules run on every rank, whatever the micro-batch holds. A term that is no mean over samples gives
        its value times `share_of`, so that the micro-batches of a step add up to it.
        """
        raise NotImplementedError

    def remembered(self, stage: FinishedStage) -> dict[str, Tensor]:
        """What later stages are told of a finished one, by names that begin with `pipeline.prompts.pool.MEMORY`.

        It lies in the stage's file and in no adapter; the learner's `bank` has that of the last stage. All ranks call
        it together.
        """
        return {}


@dataclass(frozen=True)
class FinishedStage:
    """A stage whose values are final, for terms that remember something of it."""

    values: Mapping[str, Tensor]  # the trainables in float32, by name
    memory: Mapping[str, Tensor]  # what the stage before left to be remembered
    # Of every trainable, the mean over so many training samples of its squared gradient of an answer's log-likelihood.
    mean_squares: Callable[[int], Mapping[str, Tensor]]


def make_term(choice: Choice, method: Any) -> Term:
    """The term that a method names, with its own options and those that the method's have in common with it."""
    kind: type[Term] = registry.load("terms", choice_name(choice))
    return kind.of(chosen_options("terms", kind.Options, choice, method.options))


def share_of(step: Step) -> float:
    """The share of a micro-batch in its step over all ranks: that of its samples."""
    return float(step.batch.counts()[1]) / max(step.normaliser.samples, 1.0)


class PrototypeTerm(Term):
    """ModalPrompt's: the mean of 1 - cos(key, prototype) for both keys (docs/design.md 4.8)."""

    names = ("loss_image", "loss_text")

    def losses(self, step: Step) -> tuple[Tensor, ...]:
        parts, batch = step.parts, step.batch
        prompt, _ = parts["module"]()
        prototype = parts["head"](prompt).float()[None]
        image_weight, text_weight = prototype_term_weights(batch.has_image)
        image = 1.0 - cosine_similarity(batch.image_key, prototype, dim=-1)
        text = 1.0 - cosine_similarity(batch.text_key, prototype, dim=-1)
        sums = (image * image_weight * batch.weights).sum(), (text * text_weight * batch.weights).sum()
        return tuple(found / max(step.normaliser.samples, 1.0) for found in sums)
