"""Trains a stage on a tiny model in this process; run as a script by the tests, on one or several ranks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from pipeline.backbones.lmm import LMM
from pipeline.config.recipe import Recipe
from pipeline.console.progress import Progress
from pipeline.data.keys import Keys
from pipeline.data.sample import Sample
from pipeline.data.sample_list import SampleList
from pipeline.methods import Stage
from pipeline.prompts.learner import prompt_learner
from pipeline.prompts.model import LearnerOnLMM
from pipeline.prompts.pool import PromptPool
from pipeline.ranks.launch import end_as_rank
from pipeline.ranks.shutdown import StopFlag
from pipeline.ranks.watchdog import Watchdog
from pipeline.ranks.world import World, close_world, init_world
from pipeline.runs.session import Session
from pipeline.sequence.engine import lmm_engine
from pipeline.sequence.stage import StageTrainer
from pipeline.sequence.stage_files import StageFiles
from pipeline.training.engine import Engine
from tests import tiny

KEY_WIDTH = 12


def make_samples(count: int, seed: int = 0, text_only: tuple[int, ...] = ()) -> tuple[SampleList, Keys]:
    """Plain-coloured images, answers of different lengths, random keys."""
    generator = torch.Generator().manual_seed(seed)
    samples = SampleList()
    for number in range(count):
        colour = tuple(torch.randint(256, (3,), generator=generator).tolist())
        image = None if number in text_only else tiny.png(colour)
        samples.append(Sample(f"s{number}", image, f"what is {number}?" + "?" * (number % 4), "red" * (1 + number % 3)))
    flags = torch.tensor([sample.image is not None for sample in samples])
    keys = Keys(
        torch.randn(count, KEY_WIDTH, generator=generator) * flags[:, None],
        torch.randn(count, KEY_WIDTH, generator=generator),
        flags,
        {},
    )
    return samples, keys


def make_recipe(model: Path | str, **changes: Any) -> Recipe:
    """A recipe on the tiny model; `train__steps=3` sets train.steps."""
    fields: dict[str, Any] = {
        "name": "tiny",
        "data": {"source": "coin", "root": "none", "tasks": [{"name": "a"}]},
        "model": {"path": str(model), "max_length": 256},
        "keys": {"path": "none"},
        "method": {"prompt_length": 4},
        "train": {
            "steps": 3,
            "global_batch": 4,
            "lr_prompt": 0.05,
            "lr_head": 0.01,
            "schedule": "constant",
            "warmup": 0.0,
            "log_every": 1,
        },
        "tracking": {"enabled": False},
    }
    for path, value in changes.items():
        section, _, field = path.partition("__")
        if field:
            fields.setdefault(section, {})[field] = value
        else:
            fields[section] = value
    if fields["method"].get("name", "modalprompt") == "modalprompt":
        fields["method"].setdefault("router", "prototype")  # the one that is learned with the sets
    if fields["method"].get("name") == "zero_shot" and "method__prompt_length" not in changes:
        fields["method"].pop("prompt_length", None)  # it learns no set
    return Recipe.model_validate(fields)


def make_pool(sets: int, length: int = 4, width: int = tiny.HIDDEN) -> PromptPool:
    """Random finished sets."""
    generator = torch.Generator().manual_seed(7)
    pool = PromptPool()
    for number in range(sets):
        pool.append(
            f"t{number}",
            {"prompt": torch.randn(length, width, generator=generator) * 0.2},
            {"prototype": torch.randn(KEY_WIDTH, generator=generator)},
        )
    return pool


def make_module(
    lmm: LMM, length: int = 4, insertion: str = "after_bos", checkpointing: str = "none", key_width: int = KEY_WIDTH
) -> LearnerOnLMM:
    """ModalPrompt's learner on a frozen model."""
    return LearnerOnLMM(lmm, prompt_learner(lmm, length, key_width, insertion), checkpointing)


def train_once(
    engine: Engine, recipe: Recipe, world: World, folder: Path, pool: PromptPool, samples: tuple[SampleList, Keys]
) -> tuple[list[Progress], dict[str, torch.Tensor]]:
    """The stage behind those of the pool on the given samples; the history and the final values."""
    # Not by image: the recorded curves are of samples one by one.
    train = recipe.train.model_copy(update={"questions_per_image": 1})
    recipe = recipe.model_copy(update={"train": train})
    session = Session(folder, world, StopFlag(), Watchdog(world, None))
    files = StageFiles(session, [("a", "drawn")], {})
    parts: Any = [(*samples, None)]
    trainer = StageTrainer(recipe, session, lambda: engine, parts, files)
    trained = trainer.train(len(pool), Stage("a", (0,)), pool)
    return trained.history, engine.values()


def main(job_file: str) -> None:
    """Do a job {"model", "out", "runs": {name: recipe changes}, "text_only"}; rank 0 writes the results as JSON."""
    job = json.loads(Path(job_file).read_text())
    torch.set_num_threads(1)
    world = init_world()
    results: dict[str, Any] = {}
    samples = make_samples(10, text_only=tuple(job["text_only"]))
    for number, (run, changes) in enumerate(job["runs"].items()):
        recipe = make_recipe(job["model"], **changes)
        engine = lmm_engine(recipe, world, KEY_WIDTH)
        results[run] = {}
        for name in ("first", "again"):  # the second pass starts from a used optimizer and must not notice
            folder = Path(job["out"]) / f"{number}-{name}"
            history, values = train_once(engine, recipe, world, folder, make_pool(3), samples)
            results[run][name] = {
                "losses": [[p.loss, *p.terms.values()] for p in history],
                "prompt": values["prompt"].tolist(),
                "head": values["head.fc2.weight"].tolist(),
            }
    if world.main:
        (Path(job["out"]) / "result.json").write_text(json.dumps(results))
    close_world()


if __name__ == "__main__":
    end_as_rank(lambda: main(sys.argv[1]))
