"""One answer to one question, routed like a test sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pipeline.adapter import read_pool, read_projector
from pipeline.backbones.clip import KeyEncoder
from pipeline.backbones.lmm import load_lmm
from pipeline.config import Recipe, load_run
from pipeline.data.collate import Examples, StageData
from pipeline.data.sample import Sample
from pipeline.data.shards import Keys
from pipeline.errors import UserError, nearest
from pipeline.evaluate import Test, generate_answers, task_similarity
from pipeline.methods import make_method
from pipeline.prompts.routing import NO_SET

ID = "question"


class _OneSample(list[Sample]):
    """A single sample where a prepared split is expected."""

    @property
    def ids(self) -> list[str]:
        return [sample.id for sample in self]


def predict(run: Path, image: Path | None, question: str, task: str | None = None) -> dict[str, Any]:
    """Return {answer, selected, similarity} for a question about an image file, or about none.

    `task` is for methods that have to be told the task. Raises UserError for a run without finished stages, an image
    that cannot be read, or a missing or unknown task.
    """
    recipe = load_run(run)
    method = make_method(recipe.method)
    number = _task_number(recipe, task, method.needs_task)
    sample = Sample(ID, _read(image), question, answer="")
    _check_picture(sample, image)
    pool = read_pool(run, recipe)
    if method.needs_task and number >= len(pool):
        raise UserError(f"task '{task}' has no finished stage yet; expected one of {', '.join(pool.names)}.")
    data = StageData([(_OneSample([sample]), _keys(recipe, sample), None)])
    longest = max(task.max_new_tokens for task in recipe.data.tasks)
    scores = task_similarity(Test(ID, "exact", longest, data), pool, recipe.method.image_weight)
    selected = method.answering_sets(pool, number, scores, data.keys.has_image)
    lmm = load_lmm(recipe.model).to("cuda" if torch.cuda.is_available() else "cpu")
    if recipe.train.projector == "trained":
        lmm.load_projector(read_projector(run, recipe))
    examples = Examples(data, lmm.conversation)
    answers = generate_answers(lmm, examples, [0], selected, pool.prompts, longest, 1, recipe.method.insertion)
    return {
        "answer": answers[0],
        "selected": [pool.names[index] for index in selected[0].tolist() if index != NO_SET],
        "similarity": {name: round(score, 4) for name, score in zip(pool.names, scores[0].tolist(), strict=True)},
    }


def _task_number(recipe: Recipe, task: str | None, needed: bool) -> int:
    names = [known.name for known in recipe.data.tasks]
    if task in names:
        return names.index(task)
    if task is not None:
        raise UserError(f"unknown task '{task}'; expected one of {', '.join(names)}.{nearest(task, names)}")
    if needed:
        what = recipe.method.name if recipe.method.name == "independent" else f"selection {recipe.method.selection}"
        raise UserError(f"method {what} has to be told the task; add --task with one of {', '.join(names)}.")
    return 0


def _read(image: Path | None) -> bytes | None:
    try:
        return None if image is None else image.read_bytes()
    except OSError as error:
        raise UserError(f"--image: '{image}' cannot be read ({error.strerror}); expected an image file.") from error


def _check_picture(sample: Sample, image: Path | None) -> None:
    try:
        sample.picture()
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise UserError(f"--image: '{image}' is not a readable image ({error}); expected PNG or JPEG.") from error


def _keys(recipe: Recipe, sample: Sample) -> Keys:
    encoder = KeyEncoder(*recipe.keys.source)
    text = encoder.text([sample.question])
    picture = sample.picture()
    image = torch.zeros_like(text) if picture is None else encoder.image([picture])
    return Keys(image, text, torch.tensor([picture is not None]), encoder.identity())
