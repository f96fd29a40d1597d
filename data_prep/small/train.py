"""Trains a projector from the start: features, words for places, then answers through the frozen language model."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

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
    torch.set_num_threads(how.threads)
    torch.manual_seed(how.seed)
    seen = pictures(tower, loaded.vision, files, how.drawings, work)
    learned, held_out = seen.split()
    _say(f"features of {len(files)} photographs and {how.drawings} drawings", started)
    projector = Projector(tower.width, language.width)
    teach_places(projector, learned, head, names, Words(language), how.place_steps)
    _say("words for places learned", started)
    template = with_images(language.tokenizer.chat_template, loaded.image_token, loaded.language.system)
    sequences = Sequences(language.tokenizer, template, loaded.image_token, PLACES**2)
    # A third of the time of float32 where a CPU has instructions for it, and 20 times as long where it has none.
    dtype = torch.float32 if emulated("bfloat16") else torch.bfloat16
    frozen = Frozen.of(language, sequences, dtype)
    facts = {
        "photographs": len(files),
        "drawings": how.drawings,
        "place_steps": how.place_steps,
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


def _say(what: str, started: float) -> None:
    print(f"[{(time.time() - started) / 60:5.1f} min] {what}", flush=True)
