"""The DeepSpeed engine of one method: its trainables on a frozen CLIP, with SGD as the published runs use it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.clip.learning.averaging import WeightAverage
from pipeline.clip.learning.few_shot_batches import micro_batches
from pipeline.clip.learning.model import ImageBatch, PromptedCLIP
from pipeline.clip.recipe import ClipTrainConfig
from pipeline.prompts.model import Normaliser
from pipeline.ranks.world import World
from pipeline.sequence.engine import Engine, gather_layer_by_layer, start_deepspeed
from pipeline.training.deepspeed_config import deepspeed_file, with_recipe
from pipeline.training.hpz import agreed_node_size, with_node_size
from pipeline.training.optimizer_state import MOMENTUM
from pipeline.training.resume import StepState


class ClipEngine(Engine):
    """One method's engine for all its datasets and seeds: they set new values, the shapes stay.

    `averaging` after `start_unit` takes in the trainables at the end of each epoch.
    """

    counts_tokens = False

    def __init__(self, module: PromptedCLIP, train: ClipTrainConfig, dtype: str, world: World) -> None:
        # Not the parent's: the model, the optimizer and the groups are others, what is done with them is the same.
        deepspeed = start_deepspeed()
        self.micro_batch, self.accumulation = micro_batches(train.global_batch, train.micro_batch, world.size)
        config = with_node_size(deepspeed_file(train.deepspeed), world.size, node=agreed_node_size())
        config = with_recipe(config, self.micro_batch, self.accumulation, train.clip, dtype)
        self.zero_stage = int(config.get("zero_optimization", {}).get("stage", 0))
        self.module: Any = module.to(world.device)
        if self.zero_stage == 3:
            gather_layer_by_layer(module)
        for parameter in module.parameters():
            if parameter.dim() == 0:  # CLIP's scale, which is kept as a buffer; DeepSpeed cannot send single numbers
                parameter.data = parameter.data.reshape(1)
        self.rates = [train.lr]
        # Only what learns: DeepSpeed would look through the frozen parameters at every step.
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(
            parameters, lr=train.lr, momentum=train.momentum, weight_decay=train.weight_decay, foreach=False
        )
        scale = float(module.backbone.scale), float(module.backbone.bias)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=config, dist_init_required=False
        )
        if self.zero_stage == 3:
            # A learner reads vectors out of lists, whose own forward never runs: on their own they are not fetched.
            for part in module.learner.modules():
                for parameter in part.parameters(recurse=False) if isinstance(part, nn.ParameterList) else ():
                    deepspeed.zero.register_external_parameter(module.learner, parameter)
        # DeepSpeed rounds buffers to the model's precision too; these scale float32 logits.
        module.backbone.scale, module.backbone.bias = (
            torch.tensor(value, dtype=torch.float32, device=world.device) for value in scale
        )
        self.trainables = dict(module.learner.named_parameters())
        self.term_names = module.term_names
        self.moment_kinds = MOMENTUM if train.momentum else ()
        self.averaging: WeightAverage | None = None
        self._steps_per_epoch = self._passes = 0

    @staticmethod
    def shards_parameters(train: ClipTrainConfig) -> bool:
        """Whether the DeepSpeed file asks for ZeRO-3, under which the backbone's weights are spread over the ranks."""
        return deepspeed_file(train.deepspeed).get("zero_optimization", {}).get("stage", 0) == 3

    def start_unit(self, values: dict[str, Tensor], steps_per_epoch: int, averaging: WeightAverage | None) -> None:
        """Begin with these trainables (same on every rank) and a new optimizer."""
        self.restart(values)
        self.averaging, self._steps_per_epoch, self._passes = averaging, steps_per_epoch, 0

    def resume_unit(self, found: StepState) -> None:
        """Go on with a unit that was begun (`start_unit`), as it was when `found` was saved."""
        self.resume_stage(found.values, found.step, found.moments)
        self._passes = found.step * self.accumulation
        if self.averaging is not None:
            self.averaging.load(found.rest)

    def rest(self) -> dict[str, Tensor]:
        """The averages so far."""
        return {} if self.averaging is None else self.averaging.state()

    def accumulate(self, batch: ImageBatch, normaliser: Normaliser) -> Tensor:  # type: ignore[override]
        """Forward and backward of one micro-batch; returns its loss terms."""
        loss, terms = self.engine(batch, normaliser.samples, normaliser.scale)
        self.engine.backward(loss)
        return torch.stack([terms[name] for name in self.term_names])

    def step(self) -> None:
        """Count the micro-batch; the last one of a step updates the trainables, the last of an epoch averages them."""
        super().step()
        self._passes += 1
        if self.averaging is not None and self._passes % (self.accumulation * self._steps_per_epoch) == 0:
            self.averaging.add(self.values())

    def total(self, terms: Sequence[float]) -> float:
        """The loss that is minimised: its terms carry their weights."""
        return sum(terms)

    def learned(self) -> dict[str, Tensor]:
        """What a finished unit has learned: the trainables, or their average over the epochs."""
        return self.values() if self.averaging is None else self.averaging.average()
