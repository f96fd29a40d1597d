"""The two forms of the model in a run: the engine that trains, and the replica that answers."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakSet

from torch import Tensor

from pipeline.backbones.lmm import LMM, load_lmm
from pipeline.config import Recipe
from pipeline.data.sample import Sample
from pipeline.distributed import World
from pipeline.engine import Engine
from pipeline.watchdog import Watchdog

KEEP_REPLICA_BYTES = 2 << 30  # a smaller evaluation replica stays in memory between stages, a larger one is loaded anew


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
        self._samples = samples  # training samples, the longest among them; see `pipeline.fitting`
        self._engine: Engine | None = None
        self._replica: LMM | None = None
        self._watched: WeakSet[LMM] = WeakSet()

    def engine(self) -> Engine:
        """The training engine, one for all stages."""
        if self._engine is None:
            self.watchdog.beat("loading the model", slow=True)
            self._engine = Engine(self.recipe, self.world, self.key_width, self._samples)
        return self._engine

    def replica(self, projector: dict[str, Tensor]) -> LMM:
        """A whole model on this rank with this projector (empty: its own): the engine's where whole, else a copy."""
        trains_projector = self.recipe.train.projector == "trained"
        if self._engine is not None and self._engine.replica is not None and not trains_projector:
            self._replica = None
            return self._show_progress(self._engine.replica)
        lmm = self._replica
        if lmm is None:
            self.watchdog.beat("loading the model to evaluate with", slow=True)
            lmm = load_lmm(self.recipe.model, device=self.world.device)
            lmm.cuts = self.recipe.data.too_long == "truncate"
            size = sum(parameter.nbytes for parameter in lmm.parameters())
            if self.world.device.type == "cpu" or size < KEEP_REPLICA_BYTES:
                self._replica = lmm
        if projector:
            lmm.load_projector(projector)
        return self._show_progress(lmm)

    def _show_progress(self, lmm: LMM) -> LMM:
        """Let the watchdog see that answers are generated: nothing can be without looking up tokens."""
        self.watchdog.beat("evaluating", slow=True)
        lmm.use_repetition_penalty(self.recipe.evaluate.repetition_penalty)
        if lmm not in self._watched:
            self._watched.add(lmm)
            lmm.model.get_input_embeddings().register_forward_hook(lambda *_: self.watchdog.progress())
        return lmm
