"""Three recorded optimizer steps of every training case through the engine and the training loop; run on N ranks."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch

from pipeline.config.method import method_options
from pipeline.data.collate import MicroBatches
from pipeline.data.order import Order
from pipeline.methods import make_method
from pipeline.ranks.launch import end_as_rank
from pipeline.ranks.shutdown import StopFlag
from pipeline.ranks.watchdog import Watchdog
from pipeline.ranks.world import close_world, init_world
from pipeline.runs.session import Session
from pipeline.sequence.engine import lmm_engine
from pipeline.training.loop import Attempt, train_stage
from pipeline.training.schedule import LearningRate
from tests.parity.recorded import Recorded
from tests.training.worlds import make_recipe


def main(job_file: str) -> None:
    """Do a job {"folder", "model", "out", "methods": {name: settings}, "ranks"}.

    Rank 0 writes {name: {task: {"losses", "prompt"}}} to "out".
    """
    job = json.loads(Path(job_file).read_text())
    torch.set_num_threads(1)
    world = init_world()
    recorded = Recorded(Path(job["folder"]))
    steps = len(next(iter(recorded.train.values()))["trajectory"])
    rate = recorded.meta["lr"]
    recipe = make_recipe(
        job["model"],
        model__max_length=1 << 20,
        method={"prompt_length": recorded.prompt_length},
        train={
            # The last batch is filled up with samples of weight zero where the ranks do not divide the samples.
            "steps": steps,
            "global_batch": recorded.samples + recorded.samples % job["ranks"],
            "lr_prompt": rate,
            "lr_head": rate,
            "schedule": "constant",
            "warmup": 0.0,
            "clip": None,
            "log_every": 1,
            "deepspeed": "ds_configs/zero3.json",
        },
    )
    engine = lmm_engine(recipe, world, recorded.key_width)
    lmm = engine.module.lmm
    vision = lmm.model.config.vision_config
    examples = recorded.examples(lmm.processor, lmm.image_token, (vision.image_size // vision.patch_size) ** 2)
    results: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in job["methods"]}
    for (name, settings), (task, case) in itertools.product(job["methods"].items(), recorded.train.items()):
        method = make_method(method_options(settings))
        engine.module.learner["module"].insertion = method.insertion
        pool = recorded.pool(case, task - 1)
        order = Order(recorded.samples, recipe.train.global_batch, recipe.seed, task)
        selected = method.routing.training(examples.data.keys, pool.states)
        batches = MicroBatches(examples, order, selected, steps, engine.accumulation, world.rank, world.size)
        engine.module.learner.start_stage(pool.tensors)
        engine.module.learner.terms[0].weight = method.prototype_weight
        engine.restart(recorded.start(task))
        folder = Path(job["out"]).parent / f"{name}-task{task}"
        folder.mkdir(exist_ok=True)
        session = Session(folder, world, StopFlag(), Watchdog(world, None))
        constant = LearningRate(rate, lambda step: 1.0)
        history = train_stage(engine, batches, recipe.train, constant, session, Attempt(folder))
        results[name][task] = {
            "losses": [[*p.terms.values()] for p in history],
            "prompt": engine.values()["prompt"].tolist(),
        }
    if world.main:
        Path(job["out"]).write_text(json.dumps(results))
    close_world()


if __name__ == "__main__":
    end_as_rank(lambda: main(sys.argv[1]))
