"""The training loop of one stage, on one screen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from pipeline.config.recipe import TrainConfig
from pipeline.console.progress import Progress, ProgressLog
from pipeline.data.collate import counts_of_step
from pipeline.data.loader import loaded
from pipeline.errors import Interrupted, PipelineError
from pipeline.prompts.model import Normaliser
from pipeline.ranks.shutdown import StopFlag
from pipeline.ranks.watchdog import Watchdog
from pipeline.ranks.world import World, gather_objects, on_main, sum_over_ranks
from pipeline.training.resume import StepSaver

LAST_GOOD = "last_good.safetensors"


class Trained(Protocol):
    """What the loop needs of an engine: one module with trainables, and an optimizer."""

    accumulation: int
    term_names: tuple[str, ...]
    counts_tokens: bool  # whether its batches count the tokens of answers

    def scale_learning_rates(self, factor: float) -> None: ...

    def accumulate(self, batch: Any, normaliser: Normaliser) -> torch.Tensor: ...

    def step(self) -> None: ...

    def gradient_norm(self) -> float | None: ...

    def total(self, terms: Sequence[float]) -> float: ...

    def values(self) -> dict[str, torch.Tensor]: ...


class Loader(Protocol):
    """The micro-batches of one rank: `accumulation` for each of so many `steps`."""

    steps: int
    accumulation: int

    def __len__(self) -> int: ...

    def __getitem__(self, item: int, /) -> Any: ...


class DivergedError(PipelineError):
    """A loss or gradient is not a finite number; the message names the step and its samples."""


def total_steps(config: TrainConfig, batches_per_epoch: int) -> int:
    """Optimizer steps of a stage."""
    return config.steps or max(1, round(config.epochs * batches_per_epoch))


def schedule(config: TrainConfig, step: int, total: int) -> float:
    """Factor of the learning rates at a step (0-based): warm-up, then constant, cosine or linear to 0.

    The warm-up is linear, or logarithmic as DeepSpeed's WarmupLR, whose first step has rate 0 (modalprompt.md 4.2).
    """
    warmup = math.ceil(config.warmup * total)
    if step < warmup:
        log_warmup = config.warmup_curve == "log"
        return math.log(step + 1) / math.log(max(2, warmup)) if log_warmup else (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, total - warmup)
    return 1.0 - done if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


def train_stage(
    engine: Trained,
    batches: Loader,
    config: TrainConfig,
    world: World,
    folder: Path,
    stop: StopFlag,
    report: Callable[[Progress], None] | None = None,
    factors: Callable[[int], float] | None = None,
    saver: StepSaver | None = None,
    watchdog: Watchdog | None = None,
    start: int = 0,
) -> list[Progress]:
    """Train the current stage from step `start` to its end and return what was logged.

    `folder` takes metrics.jsonl and, if training diverges, the last good values; `factors` gives the factor of the
    learning rates at a step (0-based), by default the config's `schedule`; `saver` keeps the state in between and when
    a signal stops it. Raises DivergedError or Interrupted, on all ranks.
    """
    total, history = batches.steps, []
    loader = loaded_steps(batches, config.workers, start)
    with ProgressLog(folder, total, world.main, engine.counts_tokens) as shown:
        for step in range(start, total):
            if watchdog is not None:
                watchdog.beat(f"step {step + 1} of {total}", slow=step == start)
            micro_batches = [batch.to(world.device) for batch in next(loader)]
            counts = sum_over_ranks(counts_of_step(micro_batches).to(world.device, torch.float32)).tolist()
            normaliser = Normaliser(counts[0], counts[1], scale=float(world.size * engine.accumulation))
            factor = schedule(config, step, total) if factors is None else factors(step)
            engine.scale_learning_rates(factor)
            terms = torch.zeros(len(engine.term_names), device=world.device)
            for number, batch in enumerate(micro_batches):
                terms += engine.accumulate(batch, normaliser)
                if number < len(micro_batches) - 1:
                    engine.step()
            # One sum tells every rank the same: the losses, whether any is not finite, whether anyone was told to stop,
            # and whether the state is to be saved.
            due = saver is not None and saver.is_due(step + 1)
            agreed = sum_over_ranks(torch.cat([terms, terms.new_tensor([float(stop.requested), float(due)])])).tolist()
            losses, (stopping, saving) = agreed[:-2], agreed[-2:]
            if not all(map(math.isfinite, losses)):
                kept = _save_last_good(engine, world, folder)
                raise _diverged("loss", step, micro_batches, not bool(terms.isfinite().all()), kept)
            engine.step()
            norm = engine.gradient_norm()
            if norm is not None and not math.isfinite(norm):
                raise _diverged("gradient", step, micro_batches, True)
            shown.moved(step + 1, *counts)
            if (step + 1) % config.log_every == 0 or step in (0, total - 1):
                named = dict(zip(engine.term_names, losses, strict=True))
                progress = shown.report(engine.total(losses), named, config.lr_prompt * factor)
                history.append(progress)
                if report is not None:
                    report(progress)
            if step + 1 == total:
                break  # the stage is finished and its own checkpoint follows; who was told to stop does so after it
            trouble = saver.save(step + 1) if saver is not None and (stopping or saving) else None
            if stopping:
                place = saver.newest_name() if saver is not None else "the stage's start"
                raise Interrupted(
                    f"Stopped by a signal after step {step + 1} of {total}.{' ' + trouble if trouble else ''} What was "
                    f"finished is kept; run the same command again to go on from {place}."
                )
    return history


def loaded_steps(batches: Loader, workers: int, start: int = 0) -> Iterator[list[Any]]:
    """The micro-batches of each optimizer step from `start` on."""
    items = range(start * batches.accumulation, len(batches))
    loader = loaded(batches, items, workers)
    for _ in range(start, batches.steps):
        yield [next(loader) for _ in range(batches.accumulation)]


def _save_last_good(engine: Trained, world: World, folder: Path) -> str:
    """Keep the trainables as they were before the step that went wrong (nothing has been updated yet); says where."""
    values = engine.values()

    def write() -> str:
        path = folder / LAST_GOOD
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file({name: value.contiguous() for name, value in values.items()}, path)
        except (OSError, SafetensorError) as error:  # a full disk must not hide what happened
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
