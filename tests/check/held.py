"""Trains one step with the project's engine and counts the bytes it then holds; run as a script by the tests."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.prompts.pool import PromptPool
from pipeline.ranks.launch import end_as_rank
from pipeline.ranks.world import close_world, init_world
from pipeline.sequence.engine import lmm_engine
from pipeline.training.engine import Engine
from tests.training.worlds import KEY_WIDTH, make_recipe, make_samples, train_once


def weights_and_trainables(engine: Engine, trained: bool) -> Iterator[Tensor]:
    """What stands for the parameters: ZeRO-3's partitions, the parameters themselves where they are whole."""
    for parameter in engine.module.parameters():
        if parameter.requires_grad == trained:
            if hasattr(parameter, "ds_tensor"):
                yield parameter.ds_tensor
            if parameter.numel():
                yield parameter.data
    if not trained:
        yield from engine.module.lmm.buffers()


def optimizer_tensors(engine: Engine) -> Iterator[Tensor]:
    """Masters and moments; a parameter that the optimizer updates in place comes too."""
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for group in inner.param_groups:
        yield from group["params"]
    for state in inner.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):
        yield from getattr(engine.optimizer, name, [])
    for group in getattr(engine.optimizer, "fp32_groups", []):
        yield from group


def storages(tensors: Iterable[Tensor], without: Iterable[int] = ()) -> dict[int, int]:
    """Bytes of the storages behind tensors, each once."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return {place: size for place, size in found.items() if place not in set(without)}


def main(job_file: str) -> None:
    """Do a job {"model", "out", "runs": {name: recipe changes}}; rank 0 writes the bytes per run as JSON."""
    job = json.loads(Path(job_file).read_text())
    torch.set_num_threads(1)
    world = init_world()
    results: dict[str, Any] = {}
    for number, (run, changes) in enumerate(job["runs"].items()):
        recipe = make_recipe(job["model"], train__steps=1, **changes)
        engine = lmm_engine(recipe, world, KEY_WIDTH)
        folder = Path(job["out"]) / f"{number}"
        train_once(engine, recipe, world, folder, PromptPool(), make_samples(8))
        weights = storages(weights_and_trainables(engine, trained=False))
        trainables = storages(weights_and_trainables(engine, trained=True), weights)
        optimizer = storages(optimizer_tensors(engine), [*weights, *trainables])
        results[run] = {
            "weights": sum(weights.values()),
            "trainables": sum(trainables.values()),
            "optimizer": sum(optimizer.values()),
        }
    if world.main:
        (Path(job["out"]) / "held.json").write_text(json.dumps(results))
    close_world()


if __name__ == "__main__":
    end_as_rank(lambda: main(sys.argv[1]))
