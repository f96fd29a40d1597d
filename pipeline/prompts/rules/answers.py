"""Whether what a rule returns is a choice of modules at all, said before a run trains with it."""

from __future__ import annotations

import traceback
from typing import Any

import torch

from pipeline.data.selection import NO_SET, Selection
from pipeline.errors import UserError
from pipeline.prompts.rules.base import Rule

TRIED = (1, 2, 5)  # modules there are when a rule is tried
SAMPLES = 3


def checked(rule: Rule, answer: Any, samples: int, modules: int, most: int | None = None) -> Selection:
    """What `rule` returned for N samples and T modules, at most `most` for each.

    Raises UserError where it is no selection of such shapes, numbers and weights: model and files would take it for
    another choice, or fail on it after a stage has been trained.
    """
    fault = _fault(answer, samples, modules, most)
    if fault:
        raise UserError(f"The selection rule {_named(rule)} returned {fault}. docs/extending.md describes a rule.")
    selection: Selection = answer
    return selection


def try_rule(rule: Rule) -> None:
    """Let a rule choose among made-up scores; UserError where it fails or what it returns cannot be used."""
    if type(rule).inference is Rule.inference:
        raise UserError(
            f"The selection rule {_named(rule)} has no method inference(scores, tasks); expected one that returns a "
            "Selection, as docs/extending.md describes."
        )
    for modules in TRIED:
        scores = torch.linspace(-0.2, 0.9, SAMPLES * modules).view(SAMPLES, modules)
        try:
            answer, most = rule.inference(scores, torch.zeros(SAMPLES, dtype=torch.long)), rule.most(modules)
        except UserError:
            raise
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(
                f"The selection rule {_named(rule)} failed on made-up scores [{SAMPLES}, {modules}] with "
                f"{type(error).__name__}: {error} ({where.filename}, line {where.lineno}); "
                "a rule has to choose among any number of modules."
            ) from error
        checked(rule, answer, SAMPLES, modules, most)


def _named(rule: Rule) -> str:
    return f"{type(rule).__module__}:{type(rule).__qualname__}"


def _fault(answer: Any, samples: int, modules: int, most: int | None) -> str | None:
    """What is wrong with an answer and what was expected; None where nothing is."""
    if not isinstance(answer, Selection):
        return f"a {type(answer).__name__}; expected a Selection of pipeline.data.selection"
    numbers, weights = answer.numbers, answer.weights
    if not isinstance(numbers, torch.Tensor) or numbers.ndim != 2 or len(numbers) != samples:
        return f"numbers of {_shape(numbers)}; expected [{samples}, m], one row per sample"
    if numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool:
        return f"numbers of {numbers.dtype}; expected whole numbers, torch.long"
    if numbers.numel() and not (int(numbers.min()) >= NO_SET and int(numbers.max()) < modules):
        found = f"the module numbers {int(numbers.min())} to {int(numbers.max())}"
        return f"{found}; expected 0 to {modules - 1}, or NO_SET ({NO_SET}), as there are {modules} modules"
    given = numbers != NO_SET
    if most is not None and numbers.numel() and int(given.sum(1).max()) > most:
        return f"{int(given.sum(1).max())} modules for one sample; expected at most the {most} that its most() says"
    if weights is None:
        return None
    if not isinstance(weights, torch.Tensor) or weights.shape != numbers.shape:
        return f"weights of {_shape(weights)}; expected {list(numbers.shape)}, one for each of its numbers, or None"
    if not weights.float().masked_fill(~given.to(weights.device), 0.0).isfinite().all():
        return "weights that are infinite or no numbers; expected a finite one for each module"
    return None


def _shape(found: Any) -> str:
    return f"shape {list(found.shape)}" if isinstance(found, torch.Tensor) else f"type {type(found).__name__}"
