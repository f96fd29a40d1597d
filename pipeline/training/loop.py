"""The training loop of one stage or unit; both halves use it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from pipeline.config.base import LoopConfig
from pipeline.console.progress import Progress, ProgressLog
from pipeline.data.collate import counts_of_step
from pipeline.data.loader import loaded
from pipeline.errors import Interrupted, PipelineError
from pipeline.ranks.world import World, gather_objects, on_main, sum_over_ranks
from pipeline.runs.layout import METRICS, label_of
from pipeline.runs.session import Session
from pipeline.training.copying import copies_ahead, on_device
from pipeline.training.normaliser import Normaliser
from pipeline.training.resume import StepSaver
from pipeline.training.schedule import LearningRate

LAST_GOOD = "last_good.safetensors"


class Trained(Protocol):
    """The interface of engines for the loop: a module with trainables, and an optimizer."""

    accumulation: int

    @property
    def term_names(self) -> tuple[str, ...]: ...

    @property
    def counts_tokens(self) -> bool: ...  # whether its batches count the tokens of answers

    def scale_learning_rates(self, factor: float) -> None: ...

    def accumulate(self, batch: Any, normaliser: Normaliser) -> torch.Tensor: ...

    def step(self) -> None: ...

    def gradient_norm(self) -> float | None: ...

    def total(self, terms: Sequence[float]) -> float: ...

    def values(self) -> dict[str, torch.Tensor]: ...


class Loader(Protocol):
    """The micro-batches of one rank: `accumulation` micro-batches for each of `steps` optimizer steps."""

    steps: int
    accumulation: int

    def __len__(self) -> int: ...

    def __getitem__(self, item: int, /) -> Any: ...


class DivergedError(PipelineError):
    """A loss or gradient is not a finite number; the message names the step and its samples."""


@dataclass(frozen=True)
class Attempt:
    """One attempt at a stage: its folder, its checkpoints, and the step that it starts after."""

    folder: Path  # for metrics.jsonl and, if training diverges, the last finite values
    saver: StepSaver | None = None  # saves checkpoints during training and on a stop signal
    start: int = 0


@dataclass(frozen=True)
class Agreed:
    """Losses and decisions of a step on which all ranks agree by one sum over the ranks."""

    losses: list[float]  # by term
    stopping: bool  # a rank was asked to stop
    saving: bool  # a rank finds that the state is to be saved

    @classmethod
    def of(cls, terms: torch.Tensor, stopping: bool, saving: bool) -> Agreed:
        """Sum this rank's loss terms [K] and flags with those of the others."""
        flags = terms.new_tensor([float(stopping), float(saving)])
        *losses, stops, saves = sum_over_ranks(torch.cat([terms, flags])).tolist()
        return cls(losses, stops > 0, saves > 0)


def train_stage(
    engine: Trained,
    batches: Loader,
    config: LoopConfig,
    rate: LearningRate,
    session: Session,
    attempt: Attempt,
    report: Callable[[Progress], None] | None = None,
) -> list[Progress]:
    """Train the current stage to its end and return the logged lines.

    Args:
        engine: the engine, with the initial or resumed values.
        batches: the micro-batches of all steps.
        config: how often to log, and the number of loader processes.
        rate: the learning rates by step.
        session: the ranks, the watchdog and the graceful shutdown.
        attempt: the stage's folder, its checkpoints and the step to start from.
        report: called with every logged line.

    Raises:
        DivergedError: a loss or gradient is not finite; on all ranks.
        Interrupted: a signal asked to stop; on all ranks.
    """
    world, saver, start, total, history = session.world, attempt.saver, attempt.start, batches.steps, []
    pinned = copies_ahead(config.copy_ahead, world.device)
    steps = on_device(loaded_steps(batches, config.workers, start, pinned), world.device, pinned)
    with ProgressLog(
        attempt.folder / METRICS, label_of(attempt.folder), total, world.main, engine.counts_tokens
    ) as shown:
        for step in range(start, total):
            session.watchdog.beat(f"step {step + 1} of {total}", slow=step == start)
            micro_batches = next(steps)
            counts = sum_over_ranks(counts_of_step(micro_batches).to(world.device, torch.float32)).tolist()
            factor = rate.factor(step)
            engine.scale_learning_rates(factor)
            scale = float(world.size * engine.accumulation)
            terms = _accumulated(engine, micro_batches, Normaliser(counts[0], counts[1], scale), world.device)
            due = saver is not None and saver.is_due(step + 1)
            agreed = Agreed.of(terms, session.stop.requested, due)
            if not all(map(math.isfinite, agreed.losses)):
                kept = _save_last_good(engine, world, attempt.folder)
                raise _diverged("loss", step, micro_batches, not bool(terms.isfinite().all()), kept)
            engine.step()
            norm = engine.gradient_norm()
            if norm is not None and not math.isfinite(norm):
                raise _diverged("gradient", step, micro_batches, True)
            shown.moved(step + 1, *counts)
            if (step + 1) % config.log_every == 0 or step in (0, total - 1):
                named = dict(zip(engine.term_names, agreed.losses, strict=True))
                history.append(shown.report(engine.total(agreed.losses), named, rate.highest * factor))
                if report is not None:
                    report(history[-1])
            if step + 1 < total:  # after the last step the caller saves the stage, and stops before the next one
                _save_and_stop(step + 1, total, agreed, saver)
    return history


def _accumulated(
    engine: Trained, micro_batches: list[Any], normaliser: Normaliser, device: torch.device
) -> torch.Tensor:
    """Accumulate the gradients of a step, without the update; returns its loss terms [K] on this rank."""
    terms = torch.zeros(len(engine.term_names), device=device)
    for number, batch in enumerate(micro_batches):
        terms += engine.accumulate(batch, normaliser)
        if number < len(micro_batches) - 1:
            engine.step()
    return terms


def _save_and_stop(done: int, total: int, agreed: Agreed, saver: StepSaver | None) -> None:
    """Save the state after `done` of `total` steps if it is due; raises Interrupted if a signal asked to stop."""
    trouble = saver.save(done) if saver is not None and (agreed.stopping or agreed.saving) else None
    if agreed.stopping:
        place = saver.newest_name() if saver is not None else "the stage's start"
        raise Interrupted(
            f"Stopped by a signal after step {done} of {total}.{' ' + trouble if trouble else ''} What was finished is "
            f"kept; run the same command again to resume from {place}."
        )


def loaded_steps(batches: Loader, workers: int, start: int = 0, pinned: bool = False) -> Iterator[list[Any]]:
    """The micro-batches of each optimizer step from `start` on, in host memory."""
    items = range(start * batches.accumulation, len(batches))
    loader = loaded(batches, items, workers, pinned=pinned)
    for _ in range(start, batches.steps):
        yield [next(loader) for _ in range(batches.accumulation)]


def _save_last_good(engine: Trained, world: World, folder: Path) -> str:
    """Write the trainables before the diverged step, which has not updated them; returns a sentence with the path."""
    values = engine.values()

    def write() -> str:
        path = folder / LAST_GOOD
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file({name: value.contiguous() for name, value in values.items()}, path)
        except (OSError, SafetensorError) as error:  # a full disk must not replace the error about the loss
            return f" The values before this step could not be kept in {path} ({error})."
        return f" The values before this step are kept in {path}."

    return on_main(world, write)


def _diverged(what: str, step: int, batches: list[Any], mine: bool, kept: str = "") -> DivergedError:
    ids = [identity for batch in batches for identity in batch.ids] if mine else []
    concerned = sorted({identity for rank in gather_objects(ids) for identity in rank})
    return DivergedError(
        f"The {what} of step {step + 1} is not a finite number; its samples are {', '.join(concerned)}.{kept} "
        "Look at these samples, or lower the learning rates in train; what was finished is kept."
    )
