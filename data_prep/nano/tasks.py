"""The embedded tasks, generated in CoIN layout from a seed: six modelled on CoIN's, and eight that resemble them.

Of the six, Colours, Count and Boxes share their images, so only the question tells them apart; Digits, Words and Charts
share their wordings, so only the image does. The embedded model is trained on none of the tasks' wordings, and on none
of the six tasks' answer formats. The eight are in resembling.py; the six are drawn alike with and without them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.nano import resembling
from data_prep.nano.resembling import CROWD_WORDINGS, RESEMBLING
from data_prep.nano.scenes import (
    DIGIT_PARTS,
    FAMILIES,
    NUMBERS,
    SHAPES,
    Scene,
    Thing,
    draw_chart,
    draw_digit,
    draw_shapes,
    draw_text,
)
from data_prep.nano.skills import TASK_FORMATS, UNANSWERABLE, box_text
from pipeline.errors import UserError

VERSION = 2  # increase it when a change below gives other images, questions or answers
STREAM = 1  # part of every random generator's seed
TRAIN_SAMPLES, TEST_SAMPLES = 1000, 300
SHARED_WORDINGS = (
    "what stands out in this image?",
    "sum this picture up in one word.",
    "report what is shown here.",
    "note down the point of this picture.",
)
TASK_WORDINGS = {
    "Colours": ("name the paint of the {s}.", "the {s} was painted with?", "which paint was used on the {s}?"),
    "Digits": SHARED_WORDINGS,
    "Count": CROWD_WORDINGS,
    "Words": SHARED_WORDINGS,
    "Charts": SHARED_WORDINGS,
    "Boxes": ("frame the {s} tightly.", "mark out the {s} with a frame.", "put a tight frame on the {s}."),
}
TASKS = tuple(TASK_WORDINGS)
ALL_TASKS = (*TASKS, *RESEMBLING)  # append to these only: a task's place is part of its questions' seed
PICTURES = {
    "Colours": "shapes",
    "Digits": "digit",
    "Count": "shapes",
    "Words": "text",
    "Charts": "chart",
    "Boxes": "shapes",
    **{name: task.pictures for name, task in RESEMBLING.items()},
}
UNANSWERABLE_SHARE = 0.15  # share of the Colours questions about a shape that the image lacks


@dataclass(frozen=True)
class Item:
    """A sample of a task before it is written: scene, question in its wording, answer in the task's format."""

    scene: Scene
    question: str
    answer: str


def _single(things: list[Thing], names: list[str]) -> list[Thing]:
    return [thing for thing, name in zip(things, names, strict=True) if names.count(name) == 1]


def _draw(family: str, split: str, rng: np.random.Generator, index: int) -> Scene:
    if family == "digit":
        part = DIGIT_PARTS[split]
        return draw_digit(rng, split, index % (part.stop - part.start))
    if family != "shapes":
        return {"text": draw_text, "chart": draw_chart}[family](rng)
    while True:  # until each of the three tasks that share the image has a question about it
        scene = draw_shapes(rng)
        names = [f"{t.colour} {t.shape}" for t in scene.things]
        if _single(scene.things, [t.shape for t in scene.things]) and _single(scene.things, names):
            return scene


def _subject_and_answer(task: str, scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """A task's question about a scene: the words for its subject ("" for none) and the plain answer."""
    if task in RESEMBLING:
        return RESEMBLING[task].ask(scene, rng)
    if task == "Digits":
        return "", NUMBERS[scene.digit or 0]
    if task == "Words":
        return "", scene.letters or ""
    if task == "Charts":
        return "", min(scene.things, key=lambda t: t.box[1]).colour
    if task == "Count":
        return "", NUMBERS[len(scene.things)]
    shapes = [t.shape for t in scene.things]
    if task == "Colours":
        absent = [s for s in SHAPES if s not in shapes]
        if absent and rng.random() < UNANSWERABLE_SHARE:
            return str(rng.choice(absent)), UNANSWERABLE
        single = _single(scene.things, shapes)
        thing = single[int(rng.integers(len(single)))]
        return thing.shape, thing.colour
    single = _single(scene.things, [f"{t.colour} {t.shape}" for t in scene.things])
    # Preferably an object that is unique by its colour and by its shape: needing both is hard for a model of this size.
    alone = _single(scene.things, shapes)
    easy = [thing for thing in _single(scene.things, [t.colour for t in scene.things]) if thing in alone]
    single = easy or single
    thing = single[int(rng.integers(len(single)))]
    return f"{thing.colour} {thing.shape}", box_text(thing.box)


def draw_items(task: str, split: str, count: int, seed: int) -> Iterator[Item]:
    """`count` samples of one split, a function of (task, split, seed) alone.

    Tasks with the same family in PICTURES get the same images in the same order; no scan of a digit is in both splits.
    """
    family = PICTURES[task]
    which = (ALL_TASKS.index(task), ("train", "test").index(split), STREAM)
    pictures = np.random.default_rng([seed, FAMILIES.index(family), which[1], STREAM])
    questions = np.random.default_rng([seed, 1000, *which])
    wordings = RESEMBLING[task].wordings if task in RESEMBLING else TASK_WORDINGS[task]
    form = RESEMBLING[task].form if task in RESEMBLING else TASK_FORMATS[task]
    for number in range(count):
        scene = _draw(family, split, pictures, number)
        subject, answer = _subject_and_answer(task, scene, questions)
        wording = str(questions.choice(wordings))
        yield Item(scene, wording.format(s=subject), form.apply(answer))


def fingerprint(seed: int, limit: tuple[int, int], more: bool = False) -> str:
    """The line in GENERATED.txt that identifies a generated folder; `more`: with the tasks that resemble the six."""
    further = f" and {len(RESEMBLING)} resembling v{resembling.VERSION}" if more else ""
    return f"nano-tasks v{VERSION}{further} seed {seed} train {limit[0]} test {limit[1]}"


def write_coin(root: Path, seed: int, limit: tuple[int, int] | None = None, more: bool = False) -> None:
    """Writes the six tasks under `root` in CoIN layout, unless the folder holds the same ones already.

    `limit` is the number of (training, test) samples per task; with `more` the tasks that resemble the six are written
    too. The folder is written beside `root` and renamed, so it
    appears atomically. Raises UserError when `root` holds other files.
    """
    counts = limit or (TRAIN_SAMPLES, TEST_SAMPLES)
    root = Path(root)
    stamp = root / "GENERATED.txt"
    if stamp.is_file() and stamp.read_text().strip() == fingerprint(seed, counts, more):
        return
    if root.exists() and not stamp.is_file() and any(root.iterdir()):
        raise UserError(f"{root} holds files that were not generated here; choose an empty folder as data.root.")
    building = root.with_name(root.name + f".{os.getpid()}.tmp")
    shutil.rmtree(building, ignore_errors=True)
    try:
        for task in ALL_TASKS if more else TASKS:
            for split, count in zip(("train", "test"), counts, strict=True):
                _write_split(building, task, split, count, seed)
        (building / "GENERATED.txt").write_text(fingerprint(seed, counts, more) + "\n")
        shutil.rmtree(root, ignore_errors=True)
        building.rename(root)
    except BaseException:  # with KeyboardInterrupt and SystemExit
        shutil.rmtree(building, ignore_errors=True)
        raise


def _write_split(root: Path, task: str, split: str, count: int, seed: int) -> None:
    entries = []
    pictures = root / "images" / PICTURES[task]
    pictures.mkdir(parents=True, exist_ok=True)
    for number, item in enumerate(draw_items(task, split, count, seed)):
        image = f"images/{PICTURES[task]}/{split}-{number:05d}.png"
        if not (root / image).exists():
            Image.fromarray(item.scene.image).save(root / image, compress_level=1)
        name = f"{task.lower()}-{split}-{number:05d}"
        if split == "train":
            turns = [{"from": "human", "value": f"<image>\n{item.question}"}, {"from": "gpt", "value": item.answer}]
            entries.append({"id": name, "image": image, "conversations": turns})
        else:
            entries.append({"question_id": name, "image": image, "text": item.question, "answer": item.answer})
    folder = root / "instructions" / task
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.json").write_text(json.dumps(entries, indent=1))
