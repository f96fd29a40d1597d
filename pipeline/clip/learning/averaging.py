"""Gaussian weight averaging: the final prompts are a weighted mean of those after each epoch (docs/design.md 5.9)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.errors import UserError


def gaussian_weights(epochs: int, mean: float, deviation: float) -> list[float]:
    """The weight of each epoch 1..`epochs`: a normal density at the epoch's number, normalised to sum 1."""
    if epochs < 1 or deviation <= 0:
        raise UserError(
            f"Weight averaging over {epochs} epochs with deviation {deviation} is not defined; expected at least one "
            "epoch and a positive deviation. Correct them."
        )
    # Subtract the largest exponent before exp, which underflows to 0 for epochs far from the mean.
    exponents = [-0.5 * ((epoch - mean) / deviation) ** 2 for epoch in range(1, epochs + 1)]
    densities = [math.exp(exponent - max(exponents)) for exponent in exponents]
    return [density / sum(densities) for density in densities]


class WeightAverage:
    """The running weighted sum of the trainables; `state` and `load` save and restore it for resuming."""

    def __init__(self, epochs: int, mean: float, deviation: float) -> None:
        self.weights = gaussian_weights(epochs, mean, deviation)
        self.done = 0
        self.sums: dict[str, Tensor] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        """Add the trainables after the next epoch, on the CPU and in float32."""
        if self.done == len(self.weights):
            raise ValueError(f"all {len(self.weights)} epochs have been added")
        weight = self.weights[self.done]
        for name, value in values.items():
            term = weight * value.detach().float().cpu()
            self.sums[name] = self.sums[name] + term if self.done else term
        self.done += 1

    def average(self) -> dict[str, Tensor]:
        """The averaged trainables; ValueError before every epoch was added."""
        if self.done < len(self.weights):
            raise ValueError(f"{self.done} of {len(self.weights)} epochs have been added")
        return dict(self.sums)

    def state(self) -> dict[str, Tensor]:
        """The number of epochs added and the weighted sum, as tensors."""
        return {"epochs": torch.tensor(self.done), **{f"sum.{name}": value for name, value in self.sums.items()}}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore an earlier `state`."""
        self.done = int(state["epochs"])
        self.sums = {name.removeprefix("sum."): value for name, value in state.items() if name.startswith("sum.")}


class EpochAveraging:
    """An engine's companion that adds the trainables to a weight average at the end of each epoch."""

    def __init__(self, average: WeightAverage, micro_batches: int) -> None:
        """`micro_batches` is the number of micro-batches of a rank per epoch."""
        self.average, self.micro_batches, self._passed = average, micro_batches, 0

    def passed(self, values: Callable[[], dict[str, Tensor]]) -> None:
        """Count a micro-batch; after the last one of an epoch, add the trainables that `values` returns."""
        self._passed += 1
        if self._passed % self.micro_batches == 0:
            self.average.add(values())

    def state(self) -> dict[str, Tensor]:
        """The state of the weight average, as tensors."""
        return self.average.state()

    def resume(self, state: dict[str, Tensor], passed: int) -> None:
        """Restore an earlier `state`, saved after `passed` micro-batches."""
        self.average.load(state)
        self._passed = passed
