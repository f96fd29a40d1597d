"""Trains a search: in every step the weights of the options on validation images, then the prompts on training images.

As published, both are first-order steps on the cross-entropy: Adam on the weights, SGD on the prompts with the new
weights. The training loop of units and stages drives it, with its log, checkpoints and stops. It needs no DeepSpeed:
the backbone of the evaluation is whole on every rank, and gradients are summed over the ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.clip.learning.model import ImageBatch, PromptedCLIP
from pipeline.clip.search_space import SearchSpace
from pipeline.ranks.world import sum_over_ranks
from pipeline.training.normaliser import Normaliser
from pipeline.training.optimizer_state import ADAM, MOMENTUM, Moments

BETAS = (0.5, 0.999)  # Adam's, as released


@dataclass(frozen=True)
class Rates:
    """The settings of both optimizers; `clip` is the largest norm of the prompts' gradient (None: no clipping)."""

    lr: float
    alpha_lr: float
    momentum: float
    weight_decay: float
    clip: float | None = None


class SearchEngine:
    """The two optimizers of a search, with the interface of `pipeline.training.engine.Engine` for loop and checkpoints.

    Args:
        module: the classifier, whose learner is the search space.
        rates: the settings of both optimizers.
        validation: this rank's validation batch of a step, and the weight of the whole batch over all ranks.
        accumulation: micro-batches of training images per step.
        steps_per_epoch: the number of steps after which the weights are recorded.
    """

    term_names = ("cross_entropy", "validation")
    counts_tokens = False
    moment_kinds = (*ADAM, *MOMENTUM)

    def __init__(
        self,
        module: PromptedCLIP,
        rates: Rates,
        validation: Callable[[int], tuple[ImageBatch, float]],
        accumulation: int,
        steps_per_epoch: int,
    ) -> None:
        assert isinstance(module.learner, SearchSpace)
        self.module, self.rates, self.validation = module, rates, validation
        self.space: SearchSpace = module.learner
        self.accumulation, self.steps_per_epoch = accumulation, steps_per_epoch
        self.trainables: dict[str, nn.Parameter] = dict(self.space.named_parameters())
        self.alphas, self.vectors = list(self.space.alphas.values()), list(self.space.vectors.values())
        decay = rates.weight_decay
        self.sgd = torch.optim.SGD(
            self.vectors, lr=rates.lr, momentum=rates.momentum, weight_decay=decay, foreach=False
        )
        self.adam = torch.optim.Adam(self.alphas, lr=rates.alpha_lr, betas=BETAS, foreach=False)
        self.recorded: dict[str, list[Tensor]] = {tower: [] for tower in self.space.alphas}  # after each epoch
        self._passed = 0  # micro-batches

    @property
    def optimizer(self) -> SimpleNamespace:
        """The moments of both optimizers by parameter, as `read_moments` takes them."""
        return SimpleNamespace(state={**self.sgd.state, **self.adam.state})

    def scale_learning_rates(self, factor: float) -> None:
        """Set the prompts' rate of the next step; that of the weights is constant."""
        for group in self.sgd.param_groups:
            group["lr"] = self.rates.lr * factor

    def accumulate(self, batch: ImageBatch, normaliser: Normaliser) -> Tensor:
        """Gradients of the prompts from one micro-batch, after the weights' step before the first one of a step.

        Returns this rank's shares of both losses.
        """
        validation = torch.zeros((), device=batch.labels.device)
        if self._passed % self.accumulation == 0:
            validation = self._step_alphas()
            self.sgd.zero_grad()
        # The sum over ranks and micro-batches below is no mean, so nothing has to be scaled up for one.
        loss, terms = self.module(batch, dataclasses.replace(normaliser, scale=1.0))
        for value, gradient in zip(self.vectors, torch.autograd.grad(loss, self.vectors), strict=True):
            value.grad = gradient if value.grad is None else value.grad + gradient
        return torch.stack([terms["cross_entropy"], validation])

    def _step_alphas(self) -> Tensor:
        batch, weight = self.validation(self._passed // self.accumulation)
        loss, _ = self.module(batch.to(self.alphas[0].device), Normaliser(weight, weight))
        _give(self.alphas, torch.autograd.grad(loss, self.alphas))
        if all(bool(value.grad.isfinite().all()) for value in self.alphas if value.grad is not None):
            self.adam.step()  # otherwise the loop stops after this step, because the loss is not finite either
        self.adam.zero_grad()
        return loss.detach()

    def step(self) -> None:
        """Count the micro-batch; after the last one of a step update the prompts."""
        self._passed += 1
        if self._passed % self.accumulation:
            return
        _give(self.vectors, [value.grad for value in self.vectors if value.grad is not None])
        if self.rates.clip is not None:
            nn.utils.clip_grad_norm_(self.vectors, self.rates.clip)
        self.sgd.step()
        if self._passed // self.accumulation % self.steps_per_epoch == 0:
            for tower, alphas in self.space.alphas.items():
                self.recorded[tower].append(alphas.detach().float().cpu().clone())

    def total(self, terms: Sequence[float]) -> float:
        """The training loss; that of the validation images trains other parameters."""
        return terms[0]

    def gradient_norm(self) -> float | None:
        """None: not computed."""
        return None

    def values(self) -> dict[str, Tensor]:
        """Weights and prompts in float32 on the CPU, by name."""
        return {name: value.detach().float().cpu().clone() for name, value in self.trainables.items()}

    def rest(self) -> dict[str, Tensor]:
        """The weights after each epoch so far [epochs, blocks, C + 1], by tower."""
        return {tower: torch.stack(found) for tower, found in self.recorded.items() if found}

    @torch.no_grad()
    def resume(self, step: int, values: Mapping[str, Tensor], moments: Moments, rest: Mapping[str, Tensor]) -> None:
        """Set everything to what it was after `step` steps."""
        for name, value in values.items():
            self.trainables[name].copy_(value)
        for optimizer, kinds in ((self.adam, ADAM), (self.sgd, MOMENTUM if self.rates.momentum else ())):
            owned = {id(value) for group in optimizer.param_groups for value in group["params"]}
            for name, value in self.trainables.items():
                if id(value) in owned:
                    optimizer.state[value] = {kind: moments[kind][name].to(value.device) for kind in kinds}
                    if optimizer is self.adam:
                        optimizer.state[value]["step"] = torch.tensor(float(step))
        for tower, found in rest.items():
            self.recorded[tower] = list(found)
        self._passed = step * self.accumulation


def _give(parameters: Sequence[nn.Parameter], gradients: Iterable[Any]) -> None:
    """Give parameters the sums of their gradients over the ranks, in one collective."""
    gradients = list(gradients)
    summed = sum_over_ranks(torch.cat([gradient.flatten() for gradient in gradients]))
    for parameter, part in zip(parameters, summed.split([value.numel() for value in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)
