"""The DeepSpeed engine of one method: its trainables on a frozen CLIP, with SGD as in the published runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pipeline.clip.learning.few_shot_batches import micro_batches
from pipeline.clip.learning.model import PromptedCLIP
from pipeline.clip.recipe import ClipTrainConfig
from pipeline.ranks.world import World, agreed_node_size
from pipeline.training.deepspeed_config import deepspeed_file, with_recipe
from pipeline.training.engine import Engine, Group, start_deepspeed
from pipeline.training.hpz import with_node_size
from pipeline.training.optimizer_state import MOMENTUM


def clip_engine(module: PromptedCLIP, train: ClipTrainConfig, dtype: str, world: World) -> Engine:
    """The engine of a method. Datasets and seeds share it and set their own initial values, as shapes stay the same.

    Args:
        module: the classifier; only its learner's parameters have gradients.
        train: the method's training settings, with the DeepSpeed file.
        dtype: precision of weights and step, float32 or bfloat16.
        world: the ranks.
    """
    deepspeed = start_deepspeed()
    config = with_node_size(deepspeed_file(train.deepspeed), world.size, node=agreed_node_size())
    config = with_recipe(config, *micro_batches(train.global_batch, train.micro_batch, world.size), train.clip, dtype)
    module.to(world.device)
    for parameter in module.parameters():
        if parameter.dim() == 0:  # CLIP's logit scale and bias: DeepSpeed cannot broadcast zero-dimensional parameters
            parameter.data = parameter.data.reshape(1)
    # Only the trainables: DeepSpeed iterates over all parameters of its groups at every step.
    groups = [Group([parameter for parameter in module.parameters() if parameter.requires_grad], train.lr)]

    def optimizer(parameters: list[dict[str, Any]]) -> torch.optim.Optimizer:
        decay = train.weight_decay
        return torch.optim.SGD(parameters, lr=train.lr, momentum=train.momentum, weight_decay=decay, foreach=False)

    scale = float(module.backbone.scale), float(module.backbone.bias)
    kinds = MOMENTUM if train.momentum else ()
    engine = Engine(module, dict(module.learner.named_parameters()), groups, optimizer, config, kinds)
    if engine.zero_stage == 3:
        # ZeRO-3 gathers a module's parameters when its forward runs, which a list or dict of parameters never does.
        for part in module.learner.modules():
            kept = isinstance(part, nn.ParameterList | nn.ParameterDict)
            for parameter in part.parameters(recurse=False) if kept else ():
                deepspeed.zero.register_external_parameter(module.learner, parameter)
    # DeepSpeed casts buffers to the model's precision too, but these two scale float32 logits: restore them.
    module.backbone.scale, module.backbone.bias = (
        torch.tensor(value, dtype=torch.float32, device=world.device) for value in scale
    )
    return engine


def shards_parameters(train: ClipTrainConfig) -> bool:
    """Whether the DeepSpeed file selects ZeRO-3, under which the backbone's weights are sharded over the ranks."""
    return deepspeed_file(train.deepspeed).get("zero_optimization", {}).get("stage", 0) == 3
