"""Why a task may not have been learned, as far as its recipe and its numbers of samples say; reads no tensors."""

from __future__ import annotations

from pathlib import Path

from data_prep.nano import CHECKPOINTS
from pipeline.config.recipe import Recipe
from pipeline.files.paths import command

FEW_HELD_OUT = 20  # samples, of which one is more than five percent
FEW_SAMPLES = 100  # to train on
SMALL = "the module may be too small, or its rate (train.lr_prompt) wrong for this model"
FEW_PASSES = 3  # over the training samples; a stage with fewer may have ended before its loss settled


def reasons(recipe: Recipe, trained_on: int, format_free: float | None = None) -> list[str]:
    """What may be the reason that a task was not learned, as far as it can be seen; empty where nothing can.

    Args:
        recipe: the run's recipe.
        trained_on: the task's training samples.
        format_free: its score in percent but for the format, where that is above the most frequent answer's.
    """
    found = []
    if format_free is not None:
        found.append(
            f"{format_free:.1f} percent are right but for case, punctuation or wrapping words: the content is there "
            "and the format is not learned yet"
        )
    if trained_on < FEW_SAMPLES:
        found.append(f"{trained_on} training samples are few; some hundred are usual")
    passes = _passes(recipe, trained_on)
    if passes < FEW_PASSES:
        steps = "train.steps" if recipe.train.steps is not None else "train.epochs"
        found.append(
            f"the stage passed {passes:.1f} times over {trained_on} samples; raise {steps} if the loss in the report "
            "was still falling"
        )
    if knows_drawings_alone(recipe):
        found.append(
            "the embedded model knows drawn shapes, digits, letters and charts alone and has never seen a photograph; "
            f"for other pictures see `{command('check', 'smolvlm_256m_own')}`"
        )
    elif recipe.model.image_tokens is not None:
        most = recipe.model.image_tokens
        found.append(f"an image has at most {most} tokens (model.image_tokens), which may be too few")
    return found


def _passes(recipe: Recipe, samples: int) -> float:
    """How often a stage passes over its training samples."""
    train = recipe.train
    return train.epochs if train.steps is None else train.steps * train.global_batch / max(samples, 1)


def knows_drawings_alone(recipe: Recipe) -> bool:
    """Whether the model is the embedded one, which has never seen a photograph."""
    return Path(recipe.model.location).resolve() == CHECKPOINTS.resolve() / "llava"
