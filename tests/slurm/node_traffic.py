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
from pipeline.sequence.engine import Engine
from tests.training.worlds import KEY_WIDTH, make_pool, make_recipe, make_samples, train_once


def bytes_between_nodes(interface: str) -> int:
    """Bytes that this node has received from and sent to the other one."""
    for line in Path("/proc/self/net/dev").read_text("utf-8").splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == interface:
            numbers = counters.split()
            return int(numbers[0]) + int(numbers[8])
    raise RuntimeError(f"there is no interface {interface}")


class Metered(Engine):
    """Reads the counter when a step begins, which sets its learning rate first."""

    def __init__(self, *arguments: Any) -> None:
        self.crossed: list[int] = []
        super().__init__(*arguments)

    def scale_learning_rates(self, factor: float) -> None:
        self.read_counter()
        super().scale_learning_rates(factor)

    def read_counter(self) -> None:
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
        engine = Metered(recipe, world, KEY_WIDTH)
        history, _ = train_once(
            engine, recipe, world, Path(job["out"]) / name, make_pool(1, width=job["width"]), make_samples(8)
        )
        engine.read_counter()
        crossed = [after - before for before, after in zip(engine.crossed, engine.crossed[1:], strict=False)]
        weights = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in engine.module.parameters())
        results[name] = {"crossed": crossed, "losses": [line.loss for line in history], "weights": weights}
    if world.main:
        (Path(job["out"]) / "result.json").write_text(json.dumps(results), "utf-8")
    close_world()


if __name__ == "__main__":
    end_as_rank(lambda: main(sys.argv[1]))
