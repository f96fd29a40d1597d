"""Trains a stage of the embedded model on one of four ranks and notes the bytes between the nodes before each step."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from pipeline.ranks.launch import end_as_rank
from pipeline.ranks.world import close_world, init_world
from pipeline.sequence.engine import lmm_engine
from tests.training.worlds import KEY_WIDTH, make_pool, make_recipe, make_samples, train_once


def bytes_between_nodes(interface: str) -> int:
    """Bytes that this node has received from and sent to the other one."""
    for line in Path("/proc/self/net/dev").read_text("utf-8").splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == interface:
            numbers = counters.split()
            return int(numbers[0]) + int(numbers[8])
    raise RuntimeError(f"there is no interface {interface}")


class Meter:
    """Reads the counter when a step begins and after the last one."""

    def __init__(self) -> None:
        self.crossed: list[int] = []

    def watch(self, engine: Any) -> None:
        """Read whenever the engine's learning rates are set, with which a step begins."""
        scale = engine.scale_learning_rates

        def counted(factor: float) -> None:
            self.read()
            scale(factor)

        engine.scale_learning_rates = counted

    def read(self) -> None:
        """Bytes that have crossed so far."""
        torch.distributed.barrier()  # the step before is over on all ranks
        self.crossed.append(bytes_between_nodes(os.environ["GLOO_SOCKET_IFNAME"]))


def main(job_file: str) -> None:
    """Do a job {"model", "out", "width", "steps", "configs": {name: file}}; rank 0 writes what it measured as JSON."""
    job = json.loads(Path(job_file).read_text("utf-8"))
    torch.set_num_threads(1)
    world = init_world()
    results: dict[str, Any] = {}
    for name, file in job["configs"].items():
        recipe = make_recipe(job["model"], train__steps=job["steps"], train__deepspeed=file)
        engine, meter = lmm_engine(recipe, world, KEY_WIDTH), Meter()
        meter.watch(engine)
        history, _ = train_once(
            engine, recipe, world, Path(job["out"]) / name, make_pool(1, width=job["width"]), make_samples(8)
        )
        meter.read()
        crossed = [after - before for before, after in zip(meter.crossed, meter.crossed[1:], strict=False)]
        weights = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in engine.module.parameters())
        results[name] = {"crossed": crossed, "losses": [line.loss for line in history], "weights": weights}
    if world.main:
        (Path(job["out"]) / "result.json").write_text(json.dumps(results), "utf-8")
    close_world()


if __name__ == "__main__":
    end_as_rank(lambda: main(sys.argv[1]))
