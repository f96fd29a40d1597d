"""Terms of the loss against forgetting: orthogonal subspaces, elastic weights, distillation."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from pipeline.prompts.parts.low_rank import A
from pipeline.prompts.pool import MEMORY
from pipeline.prompts.terms import FinishedStage, Step, Term, Weight, share_of

FISHER, ANCHOR = MEMORY + "fisher.", MEMORY + "anchor."


class SubspacesOptions(Weight):
    """How the penalty is counted."""

    normalise: bool = Field(False, description="divide by rank^2 and the number of earlier modules")


class OrthogonalSubspaces(Term):
    """O-LoRA's: the sum of |A_t A_i^T| over the layers, the earlier modules i and the entries."""

    Options = SubspacesOptions
    names = ("loss_orthogonal",)
    uses_bank = True

    def __init__(self, weight: float, normalise: bool = False) -> None:
        super().__init__(weight)
        self.normalise = normalise

    @classmethod
    def of(cls, options: Any) -> OrthogonalSubspaces:
        return cls(options.weight, options.normalise)

    def losses(self, step: Step) -> tuple[Tensor, ...]:
        part: Any = step.parts["module"]

        def overlap(name: str, value: Tensor) -> Tensor:
            if not name.endswith(A) or name not in step.bank:
                return value.new_zeros((), dtype=torch.float32)
            earlier = step.bank[name]  # [t-1, r, inputs]
            found = (value.float() @ earlier.float().flatten(0, 1).T).abs().sum()
            return found / (len(value) ** 2 * len(earlier)) if self.normalise else found

        return (part.summed(overlap) * share_of(step),)


class ElasticOptions(Weight):
    """How the Fisher information is estimated."""

    samples: int = Field(64, ge=1, description="training samples whose squared gradients are taken")


class Elastic(Term):
    """Elastic weight consolidation: sum_i F_i (value - value_i)^2 / 2 over the earlier tasks i.

    It depends on the tasks only by F = sum_i F_i and the mean of the values weighted with F_i, up to a constant, so two
    tensors per trainable are remembered, however many tasks there are.
    """

    Options = ElasticOptions
    names = ("loss_elastic",)

    def __init__(self, weight: float, samples: int) -> None:
        super().__init__(weight)
        self.samples = samples

    @classmethod
    def of(cls, options: Any) -> Elastic:
        return cls(options.weight, options.samples)

    def losses(self, step: Step) -> tuple[Tensor, ...]:
        part: Any = step.parts["module"]

        def stretched(name: str, value: Tensor) -> Tensor:
            if FISHER + name not in step.bank:  # the first stage
                return value.new_zeros((), dtype=torch.float32)
            away = value.float() - step.bank[ANCHOR + name].float()
            return (step.bank[FISHER + name].float() * away.square()).sum()

        return (part.summed(stretched) * share_of(step) / 2,)

    def remembered(self, stage: FinishedStage) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, fisher in stage.mean_squares(self.samples).items():
            value, before = stage.values[name], stage.memory.get(FISHER + name, torch.zeros_like(fisher))
            anchor, both = stage.memory.get(ANCHOR + name, value), before + fisher
            moved = anchor + torch.where(both > 0, fisher / both.clamp_min(1e-38), 0.0) * (value - anchor)
            found |= {FISHER + name: both, ANCHOR + name: moved}
        return found


class DistilledOptions(Weight):
    """How soft the compared scores are."""

    temperature: float = Field(2.0, gt=0, description="divides both scores")


class Distilled(Term):
    """Learning without forgetting: the divergence of the answers' tokens from what the stage before says of them.

    It is T^2 KL(before / T, now / T), so that its gradient keeps its size at any temperature T; the mean over the
    tokens of a step, as the loss of the answers. The first stage has none.
    """

    Options = DistilledOptions
    names = ("loss_distilled",)
    uses_previous = True

    def __init__(self, weight: float, temperature: float) -> None:
        super().__init__(weight)
        self.temperature = temperature

    @classmethod
    def of(cls, options: Any) -> Distilled:
        return cls(options.weight, options.temperature)

    def losses(self, step: Step) -> tuple[Tensor, ...]:
        before = step.before()
        if before is None:
            return (step.logits.sum() * 0.0,)
        now = log_softmax(step.logits / self.temperature, dim=-1)
        then = log_softmax(before / self.temperature, dim=-1)
        each = kl_div(now, then, reduction="none", log_target=True).sum(-1)
        return ((each * step.weights).sum() * self.temperature**2 / max(step.normaliser.tokens, 1.0),)
