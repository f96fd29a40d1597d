"""The time from starting Python to a verb's result, with the embedded model: what is paid before any computation."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image

from pipeline.adapter.format import Adapter, write_adapter
from pipeline.adapter.meta import FORMAT_VERSION, Meta
from pipeline.backbones.base_model import base_fingerprint
from pipeline.backbones.clip import key_identity
from pipeline.bench import measure
from pipeline.config.load import load_recipe
from pipeline.config.models import ModelConfig
from pipeline.config.paths import PROJECT
from pipeline.data.keys import Keys
from pipeline.errors import UserError
from pipeline.methods import make_method
from pipeline.prompts.pool import PromptPool

RECIPE = "nano"  # its models ship with the project
QUESTION = "how large is the group here?"
WIDTH, KEY_WIDTH = 192, 64  # of its language model and its CLIP
LENGTH = 10  # vectors per set
TOKENS = 8  # of the answer: random sets give no end token
# What nothing that answers with such a model can do without: the imports of its classes.
CLASSES = (
    "from transformers import AutoModelForImageTextToText, CLIPModel, LlavaForConditionalGeneration, LlavaProcessor"
)
ASK = f"from pipeline.adapter import load_adapter; load_adapter('adapter').ask({QUESTION!r}, 'picture.png')"
# A program's result is there before the interpreter is torn down, which with torch takes a tenth of a second and more.
DONE = "; import os; os._exit(0)"
STARTS: Mapping[str, tuple[str, ...]] = {
    "torch alone": ("-c", f"import torch{DONE}"),
    "torch and the models' classes": ("-c", f"import torch; {CLASSES}{DONE}"),
    "import pipeline.adapter": ("-c", f"import pipeline.adapter{DONE}"),
    "load_adapter and ask": ("-c", f"{ASK}{DONE}"),
    "load_adapter and ask, torn down": ("-c", ASK),
    "--help": ("-m", "pipeline", "--help"),
    "ls": ("-m", "pipeline", "ls"),
    "predict": ("-m", "pipeline", "predict", "adapter", "--image", "picture.png", "--question", QUESTION),
}


def bench_startup(rounds: int = 3, starts: Mapping[str, tuple[str, ...]] = STARTS) -> dict[str, Any]:
    """Measure each of `starts`, the arguments of Python by name, in a process of its own; numbers are medians.

    They use an adapter of random prompt sets on the embedded model, and a folder without runs. They take turns, so that
    other work of the machine meets all of them. Raises UserError when one of the processes fails.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_random_adapter(folder / "adapter")
        Image.new("RGB", (48, 48), (200, 40, 40)).save(folder / "picture.png")
        (folder / "runs").mkdir()
        found: dict[str, list[tuple[float, float]]] = {start: [] for start in starts}
        for number in range(rounds + 1):
            for start, words in starts.items():
                measured = _measured(words, folder)
                if number:  # the first round reads files from the disk that are in memory afterwards
                    found[start].append(measured)
            measure.tell(f"round {number} of {rounds}")
    variants = {
        start: {"processor_s": round(_median(each, 0), 2), "seconds": round(_median(each, 1), 2)}
        for start, each in found.items()
    }
    return {"machine": measure.machine("cpu"), "rounds": rounds, "variants": variants}


def write_random_adapter(folder: Path, model: ModelConfig | None = None) -> None:
    """Write an adapter of the default recipe's method, with a random set and random routing keys for each task.

    `model` is used in place of the recipe's, and has its width.
    """
    recipe = load_recipe(RECIPE)
    model = model or recipe.model
    routing, names = make_method(recipe.method).routing, [task.name for task in recipe.data.tasks]
    pool, generator = PromptPool(), torch.Generator().manual_seed(0)
    for name in names:
        image, text = torch.randn(2, 128, KEY_WIDTH, generator=generator)
        state = routing.observe(Keys(image, text, torch.ones(128, dtype=torch.bool), {}))
        pool.append(name, {"prompt": torch.randn(LENGTH, WIDTH, generator=generator)}, state)
    meta = Meta(
        format=FORMAT_VERSION,
        sets=names,
        tasks=names,
        recipe=RECIPE,
        method=recipe.method,
        model=model,
        clip=recipe.keys,
        base_model=base_fingerprint(model),
        keys=key_identity(*recipe.keys.source),
        max_new_tokens=TOKENS,
    )
    write_adapter(Adapter(meta, pool), folder)


def _measured(words: tuple[str, ...], folder: Path) -> tuple[float, float]:
    """(processor seconds, seconds) of a Python process with these arguments, its children not counted."""
    paths = filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with (folder / "output").open("w+") as output:
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *words], cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            said = output.read().strip().splitlines() or ["no output"]
            raise UserError(f"`python {' '.join(words)}` failed: {said[-1]}; start it by itself to see more.")
    return used.ru_utime + used.ru_stime, seconds


def _median(each: list[tuple[float, float]], column: int) -> float:
    return statistics.median(row[column] for row in each)
