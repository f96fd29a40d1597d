"""Trains a projector from the start: features, words for places, then answers through the frozen language model."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_prep.assemble.language import load_language
from data_prep.assemble.parts import find_part
from data_prep.assemble.recipe import load_assemble_recipe
from data_prep.assemble.template import with_images
from data_prep.assemble.vision import LITE_PATCH, efficientnet_lite
from data_prep.small.align import Frozen, Rows, Sequences, align, measure
from data_prep.small.classes import imagenet_names
from data_prep.small.drawings import PLACES
from data_prep.small.features import photographs_in, pictures
from data_prep.small.places import Projector, Words, teach_places
from pipeline.errors import UserError
from pipeline.files.atomic import replacing
from pipeline.planning.frozen_models import emulated

MEASURED = 40  # held-out pictures of each kind for the scores at the end


@dataclass(frozen=True)
class Photographs:
    """A folder of photographs and the pattern of the names of those to use."""

    folder: Path
    like: str


@dataclass(frozen=True)
class Training:
    """How long and on what a projector is trained."""

    minutes: float
    place_steps: int
    drawings: int
    seed: int = 0
    threads: int = 2
    start: Path | None = None  # an earlier projector to go on from, in place of words for places


def train(recipe: str, photographs: Photographs, out: Path, work: Path, how: Training) -> None:
    """Train the projector for a recipe's vision tower and language model, and write it to `out`.

    Raises UserError where a part or the photographs are missing, or the tower is not an EfficientNet-Lite, whose own
    classifier gives the targets.
    """
    loaded, base = load_assemble_recipe(recipe)
    vision, started = loaded.vision, time.time()
    if vision.layout != "efficientnet_lite":
        raise UserError(
            f"vision.layout of '{recipe}' is {vision.layout}; expected efficientnet_lite, whose own classifier "
            "teaches a projector."
        )
    if vision.image_size != PLACES * LITE_PATCH:
        raise UserError(
            f"vision.image_size is {vision.image_size}; drawings are made for {PLACES * LITE_PATCH} pixels."
        )
    files, names = photographs_in(photographs.folder, photographs.like), imagenet_names()
    tower, head = efficientnet_lite(find_part("vision", vision, base).path, vision.image_size)
    part = find_part("language", loaded.language, base)
    language = load_language(part.folder, part.file)
    earlier = _earlier(how.start, tower.width, language.width) if how.start else None
    torch.set_num_threads(how.threads)
    torch.manual_seed(how.seed)
    seen = pictures(tower, loaded.vision, files, how.drawings, work)
    learned, held_out = seen.split()
    _say(f"features of {len(files)} photographs and {how.drawings} drawings", started)
    projector = Projector(tower.width, language.width)
    if earlier is None:
        teach_places(projector, learned, head, names, Words(language), how.place_steps)
        _say("words for places learned", started)
    else:
        projector.load_state_dict(earlier)
    template = with_images(language.tokenizer.chat_template, loaded.image_token, loaded.language.system)
    sequences = Sequences(language.tokenizer, template, loaded.image_token, PLACES**2)
    dtype = faster_dtype(language.width)
    frozen = Frozen.of(language, sequences, dtype)
    facts = {
        "photographs": len(files),
        "drawings": how.drawings,
        "place_steps": 0 if how.start else how.place_steps,
        "start": how.start.name if how.start else None,
        "seed": how.seed,
        "dtype": str(dtype).removeprefix("torch."),
    }

    def save(step: int) -> None:
        minutes = round((time.time() - started) / 60)
        tensors = {name: value.half().contiguous() for name, value in projector.state_dict().items()}
        with replacing(out) as temporary:
            save_file(tensors, temporary, {"trained": json.dumps({**facts, "steps": step, "minutes": minutes})})

    save(0)
    steps = align(projector, frozen, Rows(learned, head, names, how.seed + 1), how.minutes, save)
    save(steps)
    scores = measure(projector, frozen, Rows(held_out, head, names, how.seed + 2), MEASURED)
    _say(f"{steps} steps; on held-out pictures {', '.join(f'{kind} {v:.0f} %' for kind, v in scores.items())}", started)


def faster_dtype(width: int) -> torch.dtype:
    """float32 or bfloat16, by the time of a matrix product on this machine.

    bfloat16 takes a third of float32's time on some CPUs with instructions for it, 1.7 times as long on others, and 20
    times as long where there are none.
    """
    if emulated("bfloat16"):
        return torch.float32

    def seconds(dtype: torch.dtype) -> float:
        inputs, weight = torch.ones(256, width, dtype=dtype), torch.ones(2 * width, width, dtype=dtype)
        times = []
        for _ in range(20):
            before = time.perf_counter()
            inputs @ weight.T
            times.append(time.perf_counter() - before)
        return min(times)

    return min((torch.float32, torch.bfloat16), key=seconds)


def _earlier(path: Path, vision: int, language: int) -> dict[str, Tensor]:
    """The weights of an earlier projector; UserError where the file is not one of these widths."""
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be read as a projector ({error}); expected a .safetensors of this command."
        ) from error
    with torch.device("meta"):
        expected = {name: value.shape for name, value in Projector(vision, language).state_dict().items()}
    if {name: value.shape for name, value in found.items()} != expected:
        sizes = ", ".join(f"{name} {list(shape)}" for name, shape in expected.items())
        raise UserError(f"{path} is no projector for these parts; expected {sizes}.")
    return {name: value.float() for name, value in found.items()}


def _say(what: str, started: float) -> None:
    print(f"[{(time.time() - started) / 60:5.1f} min] {what}", flush=True)
