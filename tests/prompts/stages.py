"""Stages of a few steps on a tiny model, of the project's learner and of a loss that a test writes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.backbones.lmm import LMM
from pipeline.data.collate import Batch, Examples, collate
from pipeline.data.keys import Keys
from pipeline.data.stage_data import StageData
from pipeline.methods import Method
from pipeline.prompts.model import LearnerOnLMM
from pipeline.prompts.pool import PromptPool
from pipeline.prompts.stage_files import add_stage, stage_tensors
from pipeline.sequence.engine import learner_of
from pipeline.training.normaliser import Normaliser
from tests.training.worlds import KEY_WIDTH, make_samples

RATE, STEPS, SAMPLES = 0.3, 2, 4  # without Adam, which makes whole steps of gradients that are only rounding
Values = Mapping[str, Tensor]
# The loss of a batch, and the terms of it, from a stage's values and what earlier stages left (`PromptPool`).
Loss = Callable[[Values, PromptPool, Batch], Tensor]


@dataclass
class Trained:
    """What stages left: the pool, and of each stage its starting values, losses and final values."""

    pool: PromptPool = field(default_factory=PromptPool)
    starts: list[Values] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)
    values: list[Values] = field(default_factory=list)


def stage_batch(lmm: LMM, method: Method, pool: PromptPool, stage: int) -> Batch:
    """All samples of a stage, one of them without an image, with the modules that its rule gives them in training."""
    samples, keys = make_samples(SAMPLES, seed=stage, text_only=(1,))
    selected = method.routing.training(keys, pool.states)
    return collate(Examples(StageData([(samples, keys, None)]), lmm.conversation), range(SAMPLES), [1.0] * 4, selected)


def stage_keys(stage: int) -> Keys:
    """The routing keys of a stage's samples."""
    return make_samples(SAMPLES, seed=stage, text_only=(1,))[1]


def trained_by_project(lmm: LMM, method: Method, stages: int = 2, policy: str = "none") -> Trained:
    """Train with the project's parts and terms."""
    found, learner = Trained(), learner_of(lmm, method, KEY_WIDTH)
    module, parameters = LearnerOnLMM(lmm, learner, policy), learner.trainables()
    for stage in range(stages):
        pool = found.pool
        batch = stage_batch(lmm, method, pool, stage)
        learner.start_stage({**(pool.tensors if batch.selected.shape[1] else {}), **pool.common, **pool.memory})
        start = learner.start(lmm, 0, stage, pool.newest())
        for name, parameter in parameters.items():
            parameter.data.copy_(start[name])
        optimizer, losses = torch.optim.SGD(parameters.values(), lr=RATE), []
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss, _ = module(batch, Normaliser(*batch.counts()))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        values = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        _add(
            found, method, stage, learner.finish(values), learner.outcome(values, pool.newest()), start, losses, values
        )
    return found


def trained_by_formulas(lmm: LMM, method: Method, loss_of: Loss, starts: list[Values], frozen: str = "") -> Trained:
    """Train the same values by a loss that is written out; from stage 2 on those whose name begins so are frozen."""
    found, learner = Trained(), learner_of(lmm, method, KEY_WIDTH)
    for stage, start in enumerate(starts):
        batch = stage_batch(lmm, method, found.pool, stage)
        learned = {name: value.clone().requires_grad_() for name, value in start.items()}
        kept = [name for name in learned if stage and frozen and name.startswith(frozen)]
        moving = [value for name, value in learned.items() if name not in kept]
        optimizer, losses = torch.optim.SGD(moving, lr=RATE), []
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = loss_of(learned, found.pool, batch)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        values = {name: value.detach() for name, value in learned.items()}
        outcome = learner.outcome(values, found.pool.newest())
        _add(found, method, stage, learner.finish(values), outcome, start, losses, values)
    return found


def _add(found, method, stage, learned, outcome, start, losses, values) -> None:
    state = method.routing.observe(stage_keys(stage), learned or None, f"t{stage}")
    add_stage(found.pool, f"t{stage}", stage_tensors(outcome, state))
    found.starts.append(start)
    found.losses.append(losses)
    found.values.append(values)


def assert_same(found: Trained, expected: Trained) -> None:
    """Losses and final values agree to the rounding of two different orders of float32 sums."""
    for ours, theirs in zip(found.losses, expected.losses, strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=1e-4, rtol=1e-4)
    for stage, values in enumerate(expected.values):
        for name, value in values.items():
            torch.testing.assert_close(found.values[stage][name], value, atol=2e-4, rtol=1e-2, msg=f"{stage} {name}")
