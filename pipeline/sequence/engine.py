"""The engine that trains prompt sets on a frozen multimodal model, and what a stage's trainables start from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.backbones.lmm import LMM, load_lmm
from pipeline.backbones.lmm_families import require_kept_features
from pipeline.config.recipe import Recipe
from pipeline.methods import make_method
from pipeline.prompts.model import PromptedLMM
from pipeline.ranks.world import World, agreed_node_size
from pipeline.training.deepspeed_config import AUTO, deepspeed_config
from pipeline.training.engine import Engine, Group, start_deepspeed

PROJECTOR = "projector."  # how the names of a trained projector's weights begin among the trainables


def lmm_engine(recipe: Recipe, world: World, key_width: int) -> Engine:
    """One engine for a whole sequence: its `module` is a `PromptedLMM`, whose trainables keep their shapes."""
    start_deepspeed()
    config = deepspeed_config(recipe.train, recipe.model.dtype, world.size, agreed_node_size())
    sharded = int(config.get("zero_optimization", {}).get("stage", 0)) == 3
    lmm = load_lmm(recipe.model, config if sharded else None, None if sharded else world.device)
    lmm.cuts = recipe.data.too_long == "truncate"
    method, train = make_method(recipe.method), recipe.train
    # As for the DeepSpeed file, `auto` that `pipeline.planning.auto` has not resolved means what it does on CPUs.
    checkpointing = "none" if train.checkpointing == AUTO else train.checkpointing
    if train.vision_features == "kept":
        require_kept_features(lmm.family.kind)
    module = PromptedLMM(lmm, method.prompt_length, key_width, method.insertion, checkpointing)
    module.to(world.device)
    trainables: dict[str, nn.Parameter] = {
        "prompt": module.prompt,
        **{f"head.{name}": parameter for name, parameter in module.head.named_parameters()},
    }
    groups = [Group([module.prompt], train.lr_prompt), Group(list(module.head.parameters()), train.lr_head)]
    if train.projector == "trained":
        lmm.train_projector()
        projector = dict(lmm.projector().named_parameters())
        trainables |= {f"{PROJECTOR}{name}": value for name, value in projector.items()}
        groups.append(Group(list(projector.values()), train.lr_projector))

    def optimizer(parameters: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, betas=train.betas, eps=train.eps, weight_decay=train.weight_decay)

    return Engine(module, trainables, groups, optimizer, config)


def initial_values(
    module: PromptedLMM, init: str, seed: int, stage: int, previous: Tensor | None = None
) -> dict[str, Tensor]:
    """Starting values of a stage's trainables, a function of (seed, stage) alone and so equal on every rank.

    `init`: vocab_rows (rows of the frozen input embedding picked at random, docs/design.md 4.2), normal (deviation
    0.02), previous (the previous stage's set `previous` [L, D]; vocab_rows in the first stage). The head starts as
    `torch.nn.Linear` does.
    """
    length, width = module.bank.shape[1:]
    generator = torch.Generator().manual_seed((seed * 1_000_003 + stage) % 2**63)
    if init == "normal":
        prompt = torch.randn(length, width, generator=generator) * 0.02
    else:
        words = usable_rows(module.lmm)
        prompt = module.lmm.vocabulary_rows(words[torch.randint(len(words), (length,), generator=generator)])
        if init == "previous" and previous is not None:
            prompt = previous.clone()
    values = {"prompt": prompt}
    if module.lmm.trains_projector:  # every run's first stage starts from the checkpoint's own
        values |= {f"{PROJECTOR}{name}": value for name, value in module.lmm.checkpoint_projector.items()}
    for name, parameter in module.head.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        bound = module.lmm.width**-0.5  # both layers read vectors of the model's width
        values[f"head.{name}"] = (torch.rand(tuple(shape), generator=generator) * 2 - 1) * bound
    return values


def usable_rows(lmm: LMM) -> Tensor:
    """Numbers of the vocabulary rows that are ordinary words: no special tokens, no padding of the table."""
    special: set[Any] = {*lmm.tokenizer.all_special_ids, lmm.image_token}
    size = min(len(lmm.tokenizer), lmm.model.config.text_config.vocab_size)
    return torch.tensor([row for row in range(size) if row not in special])
