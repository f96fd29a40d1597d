"""The models of a run: the training engine, and the replica that generates answers."""

from __future__ import annotations

import gc
from collections.abc import Callable
from weakref import WeakSet

import torch

from pipeline.backbones.lmm import LMM, load_lmm
from pipeline.backbones.sharded import Place, held_bytes
from pipeline.config.recipe import Recipe
from pipeline.data.sample import Sample
from pipeline.planning.auto import resolve_auto
from pipeline.planning.memory_plan import KEEP_REPLICA_BYTES
from pipeline.planning.workload import Workload
from pipeline.prompts.parts.projector import load_projector
from pipeline.prompts.pool import PromptPool
from pipeline.ranks.watchdog import Watchdog
from pipeline.ranks.world import World, agree, agreed_node_size, neighbours, together
from pipeline.sequence.engine import lmm_engine
from pipeline.training.deepspeed_config import deepspeed_config
from pipeline.training.engine import Engine


class Models:
    """Loads the training engine and the replica when they are first needed.

    Args:
        recipe: the run's recipe.
        world: the ranks.
        key_width: K, the width of the routing keys.
        watchdog: is notified of progress.
        samples: training samples, the longest among them, from which `pipeline.planning.auto` plans the memory.
        shards: ranks that have one model together in evaluation, see `pipeline.planning.replicas`; 1: each has its own.
    """

    def __init__(
        self,
        recipe: Recipe,
        world: World,
        key_width: int,
        watchdog: Watchdog,
        samples: Callable[[], list[Sample]] = list,
        shards: int = 1,
    ) -> None:
        self.recipe, self.world, self.key_width, self.watchdog = recipe, world, key_width, watchdog
        self._samples, self.shards = samples, shards
        self._place: Place | None = None
        self._engine: Engine | None = None
        self._replica: LMM | None = None
        self._watched: WeakSet[LMM] = WeakSet()

    def prepare_to_train(self) -> None:
        """Make the engine before an evaluation if it can generate answers too (ZeRO-0 or ZeRO-2).

        The model is then loaded only once. All ranks call it.
        """
        if self._engine is None and self._engine_may_answer:
            node = self._resolve_auto()
            config = deepspeed_config(self.recipe.train, self.recipe.model.dtype, self.world.size, node)
            if int(config.get("zero_optimization", {}).get("stage", 0)) != 3:
                self.engine()

    def engine(self) -> Engine:
        """The training engine, one for all stages; a large replica on a GPU is released first."""
        if self._replica is not None and self._must_go(self._replica):
            self._replica = None
            gc.collect()  # some models' modules are in reference cycles, which only the collector frees
            if self.world.device.type == "cuda":
                torch.cuda.empty_cache()
        if self._engine is None:
            self.watchdog.beat("loading the model", slow=True)
            self._resolve_auto()
            self._engine = lmm_engine(self.recipe, self.world, self.key_width)
        return self._engine

    def replica(self, pool: PromptPool) -> LMM:
        """The model that answers, with the pool's shared tensors: the engine's, or a replica on `shards` ranks.

        A replica is kept for all tasks that are evaluated before the next stage is trained. All ranks call it.
        """
        if self._engine is not None and self._engine.zero_stage != 3 and self._engine_may_answer:
            self._replica = None
            return self._show_progress(self._engine.module.lmm)
        if self._replica is None:
            self.watchdog.beat("loading the model to evaluate with", slow=True)
            self._replica = self._load()
            self._replica.cuts = self.recipe.data.cuts
        load_projector(self._replica, pool.shared)
        return self._show_progress(self._replica)

    def _resolve_auto(self) -> int:
        """Resolve the recipe's `auto` settings; returns the ranks per node. All ranks call it."""
        node = agreed_node_size()
        work = Workload.of(self.recipe, self.key_width)
        if self.shards == 1 and work.evaluate.engine == "sharded":  # other ranks than these will evaluate
            work = work.evaluated_by("replicas")
        train = resolve_auto(work, self.recipe.data.cuts, self.world, self._samples, node)
        self.recipe = self.recipe.model_copy(update={"train": train})
        return node

    def _load(self) -> LMM:
        model, device = self.recipe.model, self.world.device
        if self.shards == 1:
            return load_lmm(model, device=device)
        if self._place is None:
            group = neighbours(self.world, self.shards)
            self._place = Place(self.world.rank % self.shards, self.shards, group)
        # A rank whose weights do not fit or cannot be read would leave the others waiting for its layers.
        return together(lambda: load_lmm(model, device=device, place=self._place))

    @property
    def _engine_may_answer(self) -> bool:
        """Whether an engine whose model is whole on each rank may answer in place of a replica.

        With a trained projector its model is not that of the finished stage, and a recipe with another
        `evaluate.engine` asks for a divided model or for a server.
        """
        served = self.recipe.evaluate.engine == "vllm"
        return self.recipe.train.projector != "trained" and self.shards == 1 and not served

    def _must_go(self, lmm: LMM) -> bool:
        """Whether a replica is so large that training needs its memory, the same on all ranks."""
        large = self.world.device.type == "cuda" and held_bytes(lmm.model) >= KEEP_REPLICA_BYTES
        # Ranks of a divided model hold different amounts, and load it together.
        return agree(large, self.world.device) if self.shards > 1 else large

    def _show_progress(self, lmm: LMM) -> LMM:
        """Report each generation step to the watchdog: every step calls the input embedding, so hook it."""
        self.watchdog.beat("evaluating", slow=True)
        lmm.use_repetition_penalty(self.recipe.evaluate.repetition_penalty)
        if lmm not in self._watched:
            self._watched.add(lmm)
            lmm.model.get_input_embeddings().register_forward_hook(lambda *_: self.watchdog.progress())
        return lmm
