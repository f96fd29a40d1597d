"""The engine that trains a method's parts on a frozen multimodal model."""

from __future__ import annotations

from typing import Any

import torch

from pipeline.backbones.lmm import LMM, load_lmm
from pipeline.backbones.lmm_families import require_kept_features
from pipeline.backbones.packing import require_packing
from pipeline.backbones.static_decoding import require_static
from pipeline.config.method import choice_name
from pipeline.config.recipe import Recipe
from pipeline.config.train import AUTO
from pipeline.errors import UserError
from pipeline.methods import Method, make_method
from pipeline.prompts.heads import ProjectionHead
from pipeline.prompts.learner import Learner
from pipeline.prompts.model import LearnerOnLMM
from pipeline.prompts.parts.base import Part, entry_of, kind_of
from pipeline.prompts.parts.projector import Projector
from pipeline.prompts.terms import PrototypeTerm, Term, make_term
from pipeline.ranks.world import World, agreed_node_size
from pipeline.sequence.switches import compiled_for
from pipeline.training.deepspeed_config import deepspeed_config
from pipeline.training.engine import Engine, start_deepspeed


def lmm_engine(recipe: Recipe, world: World, key_width: int) -> Engine:
    """The engine of a sequence: its `module` is a `LearnerOnLMM`, whose trainables have the same shapes in all stages.

    Args:
        recipe: the run's recipe.
        world: the ranks.
        key_width: K, the width of the routing keys.
    """
    start_deepspeed()
    config = deepspeed_config(recipe.train, recipe.model.dtype, world.size, agreed_node_size())
    sharded = int(config.get("zero_optimization", {}).get("stage", 0)) == 3
    lmm = load_lmm(recipe.model, config if sharded else None, None if sharded else world.device)
    lmm.cuts = recipe.data.cuts
    train = recipe.train
    # An `auto` that `pipeline.planning.auto` has not resolved has its value for CPUs, as for the DeepSpeed file.
    checkpointing = "none" if train.checkpointing == AUTO else train.checkpointing
    if train.vision_features == "kept":
        require_kept_features(lmm.family.kind)
    learner = learner_of(lmm, make_method(recipe.method), key_width, train.projector == "trained")
    compiled = compiled_for(lmm, train, world.device)
    if train.packing != "none":
        require_packing(lmm)
    if recipe.evaluate.static_cache:
        require_static(lmm)
    module = LearnerOnLMM(lmm, learner, checkpointing, compiled, train.packing != "none")
    module.to(world.device)

    def optimizer(parameters: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, betas=train.betas, eps=train.eps, weight_decay=train.weight_decay)

    return Engine(module, learner.trainables(), learner.groups(train), optimizer, config)


def learner_of(lmm: LMM, method: Method, key_width: int, trains_projector: bool = False) -> Learner:
    """The learner of a method's stages; UserError where its parts are incompatible.

    It has a projection head to the routing keys [K = `key_width`] only where the method's router is learned.
    """
    if method.part is None:
        raise UserError(f"the method {method.name} learns nothing; expected one with stages.")
    parts: dict[str, Part] = {"module": kind_of(method).keyed(lmm, method, key_width)}
    terms: list[Term] = []
    require_learnable(method)
    router = method.routing.router
    if router is not None and router.learned and router.learned_in == "head":
        parts["head"] = ProjectionHead(lmm.width, key_width, dtype=lmm.dtype)
        terms.append(PrototypeTerm(method.prototype_weight))
    if trains_projector:
        parts["projector"] = Projector(lmm)
    terms += [make_term(choice, method) for choice in method.terms]
    return Learner(parts, terms, entry_of(method))


def require_learnable(method: Method) -> None:
    """Raise UserError where the method's router is learned from a prompt set but the method has none.

    Also for options of learning where it is not learned.
    """
    router = method.routing.router
    if router is None:
        return
    if router.learned and router.learned_in == "module" and not kind_of(method).learns_key:
        raise UserError(
            f"the method {method.name} has no key that its router could be learned from; expected a router in closed "
            "form, such as mean."
        )
    if router.learned and router.learned_in == "head" and entry_of(method).insertion is None:
        raise UserError(
            f"the method {method.name} has no prompt set that its router could be learned from; expected a router "
            "in closed form, such as mean."
        )
    if router.learned:
        return
    if method.learns_prototypes and method.router is not None and choice_name(method.router) != "prototype":
        raise UserError(
            f"the method {method.name} declares that it learns prototypes (learns_prototypes), which its router "
            f"{choice_name(method.router)} does not use; expected the router prototype, or learns_prototypes False."
        )
    weight = type(method.options).model_fields.get("prototype_weight")
    if weight is not None and method.prototype_weight != weight.default:
        raise UserError(
            f"method.prototype_weight {method.prototype_weight:g} weighs a loss that only a learned router has, and "
            f"{router.word} is computed in closed form; leave prototype_weight out, or set method.router to prototype."
        )
