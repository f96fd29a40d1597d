"""The two forms of the model in a run: the engine that trains, and the replica that answers."""

from __future__ import annotations

import gc
from collections.abc import Callable
from weakref import WeakSet

import torch

from pipeline.backbones.lmm import LMM, load_lmm
from pipeline.config.recipe import Recipe
from pipeline.data.sample import Sample
from pipeline.planning.auto import resolve_auto
from pipeline.planning.memory_plan import KEEP_REPLICA_BYTES
from pipeline.prompts.parts.projector import load_projector
from pipeline.prompts.pool import PromptPool
from pipeline.ranks.watchdog import Watchdog
from pipeline.ranks.world import World, agreed_node_size
from pipeline.sequence.engine import lmm_engine
from pipeline.training.deepspeed_config import deepspeed_config
from pipeline.training.engine import Engine


class Models:
    """Loads each form when it is first needed."""

    def __init__(
        self,
        recipe: Recipe,
        world: World,
        key_width: int,
        watchdog: Watchdog,
        samples: Callable[[], list[Sample]] = list,
    ) -> None:
        self.recipe, self.world, self.key_width, self.watchdog = recipe, world, key_width, watchdog
        self._samples = samples  # training samples, the longest among them; see `pipeline.planning.auto`
        self._engine: Engine | None = None
        self._replica: LMM | None = None
        self._watched: WeakSet[LMM] = WeakSet()

    def prepare_to_train(self) -> None:
        """Before an evaluation that training follows: make the engine now if it can answer (ZeRO-0 or ZeRO-2), for
        then nothing else has to be loaded. All ranks call it."""
        if self._engine is None and not self._trains_projector:
            node = self._resolve_auto()
            config = deepspeed_config(self.recipe.train, self.recipe.model.dtype, self.world.size, node)
            if int(config.get("zero_optimization", {}).get("stage", 0)) != 3:
                self.engine()

    def engine(self) -> Engine:
        """The training engine, one for all stages; a large replica on a GPU makes room for it."""
        if self._replica is not None and self._must_go(self._replica):
            self._replica = None
            gc.collect()  # modules of some models are in reference cycles
            if self.world.device.type == "cuda":
                torch.cuda.empty_cache()
        if self._engine is None:
            self.watchdog.beat("loading the model", slow=True)
            self._resolve_auto()
            self._engine = lmm_engine(self.recipe, self.world, self.key_width)
        return self._engine

    def replica(self, pool: PromptPool) -> LMM:
        """A whole model on this rank with what the pool's modules share: the engine's where whole, else a copy.

        A copy stays for all tasks that are evaluated before the next stage is trained.
        """
        # Under ZeRO-3 the engine's model is spread over the ranks, and one that trains is not as a stage left it.
        if self._engine is not None and self._engine.zero_stage != 3 and not self._trains_projector:
            self._replica = None
            return self._show_progress(self._engine.module.lmm)
        if self._replica is None:
            self.watchdog.beat("loading the model to evaluate with", slow=True)
            self._replica = load_lmm(self.recipe.model, device=self.world.device)
            self._replica.cuts = self.recipe.data.cuts
        load_projector(self._replica, pool.shared)
        return self._show_progress(self._replica)

    def _resolve_auto(self) -> int:
        """Replace the recipe's `auto` settings, and return the ranks per node. All ranks call it."""
        node = agreed_node_size()
        self.recipe = resolve_auto(self.recipe, self.world, self.key_width, self._samples, node)
        return node

    @property
    def _trains_projector(self) -> bool:
        return self.recipe.train.projector == "trained"

    def _must_go(self, lmm: LMM) -> bool:
        """Whether a replica's memory is needed for training."""
        size = sum(parameter.nbytes for parameter in lmm.parameters())
        return self.world.device.type == "cuda" and size >= KEEP_REPLICA_BYTES

    def _show_progress(self, lmm: LMM) -> LMM:
        """Let the watchdog see that answers are generated: nothing can be without looking up tokens."""
        self.watchdog.beat("evaluating", slow=True)
        lmm.use_repetition_penalty(self.recipe.evaluate.repetition_penalty)
        if lmm not in self._watched:
            self._watched.add(lmm)
            lmm.model.get_input_embeddings().register_forward_hook(lambda *_: self.watchdog.progress())
        return lmm
