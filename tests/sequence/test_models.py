"""How often the frozen model is loaded for evaluation, on GPUs that are not there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.backbones.sharded import Place
from pipeline.prompts.pool import PromptPool
from pipeline.ranks.watchdog import Watchdog
from pipeline.ranks.world import World
from pipeline.sequence import models
from pipeline.sequence.models import Models
from tests.training.worlds import make_recipe

TASKS = 8


class Replica:
    """Stands in for a model of 16 bytes."""

    def __init__(self) -> None:
        self.model = torch.nn.Embedding(2, 2)
        self.model.get_input_embeddings = lambda: self.model  # type: ignore[assignment]
        self.projectors: list[Any] = []

    def parameters(self) -> Any:
        return self.model.parameters()

    def load_projector(self, values: Any) -> None:
        self.projectors.append(values)

    def use_repetition_penalty(self, penalty: Any) -> None:
        """Answers are not asked for here."""


class Loads:
    """Counts what is loaded; `whole` says whether the engine's model is whole on each rank."""

    def __init__(self, patch: pytest.MonkeyPatch, whole: bool) -> None:
        self.replicas = self.engines = self.emptied = 0
        self.devices: list[torch.device] = []
        self.whole = whole
        patch.setattr(models, "KEEP_REPLICA_BYTES", 1)
        patch.setattr(models, "load_lmm", self.load)
        patch.setattr(models, "lmm_engine", self.engine)
        patch.setattr(torch.cuda, "empty_cache", self.empty)

    def load(self, config: Any, device: torch.device) -> Replica:
        self.replicas += 1
        self.devices.append(device)
        return Replica()

    def engine(self, *_: Any) -> Any:
        self.engines += 1
        return SimpleNamespace(zero_stage=2 if self.whole else 3, module=SimpleNamespace(lmm=Replica()))

    def empty(self) -> None:
        self.emptied += 1


def on_gpu(**changes: Any) -> Models:
    world = World(0, 1, 0, torch.device("cuda", 0))
    # `auto` would ask the GPU for its memory.
    fields = {"train__checkpointing": "none", "train__deepspeed": "ds_configs/zero3.json", **changes}
    return Models(make_recipe("none", **fields), world, 12, Watchdog(world, None))


def test_one_replica_answers_all_tasks_of_an_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    loads, found = Loads(monkeypatch, whole=False), on_gpu()
    assert len({id(found.replica(PromptPool())) for _ in range(TASKS)}) == 1
    assert loads.replicas == 1
    assert loads.devices == [torch.device("cuda", 0)]


def test_a_large_replica_makes_room_for_training_and_is_loaded_once_more_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loads, found = Loads(monkeypatch, whole=False), on_gpu()
    found.replica(PromptPool())
    found.engine()
    assert found._replica is None
    assert loads.emptied == 1
    for _ in range(TASKS):
        found.replica(PromptPool())
    assert (loads.replicas, loads.engines) == (2, 1)


def test_a_small_replica_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    loads, found = Loads(monkeypatch, whole=False), on_gpu()
    monkeypatch.setattr(models, "KEEP_REPLICA_BYTES", 1 << 20)
    for _ in range(TASKS):
        found.replica(PromptPool())
        found.engine()
    assert (loads.replicas, loads.emptied) == (1, 0)


@pytest.mark.parametrize("file", ["zero0", "zero2"])
def test_an_engine_that_is_whole_answers_before_the_first_stage_too(monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    loads, found = Loads(monkeypatch, whole=True), on_gpu(train__deepspeed=f"ds_configs/{file}.json")
    found.prepare_to_train()
    for _ in range(TASKS):
        found.replica(PromptPool())
    assert (loads.replicas, loads.engines) == (0, 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"train__deepspeed": "ds_configs/zero3.json"},
        {"train__deepspeed": "ds_configs/zero2.json", "train__projector": "trained"},
    ],
)
def test_an_engine_that_cannot_answer_is_not_made_for_it(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    loads, found = Loads(monkeypatch, whole=False), on_gpu(**changes)
    found.prepare_to_train()
    found.replica(PromptPool())
    assert (loads.replicas, loads.engines) == (1, 0)


def test_a_recipe_that_divides_the_model_is_not_answered_by_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = Loads(monkeypatch, whole=True)
    world = World(3, 4, 3, torch.device("cpu"))
    recipe = make_recipe("none", train__deepspeed="ds_configs/zero2.json", evaluate__engine="sharded")
    found, places = Models(recipe, world, 12, Watchdog(world, None), shards=2), list[Place]()

    def load(config: Any, device: Any, place: Place) -> Replica:
        places.append(place)
        return Replica()

    monkeypatch.setattr(models, "neighbours", lambda world, size: (world.rank, size))
    monkeypatch.setattr(models, "load_lmm", load)
    found.engine()
    for _ in range(TASKS):
        found.replica(PromptPool())
    found.prepare_to_train()
    assert places == [Place(1, 2, (3, 2))] and loads.engines == 1
