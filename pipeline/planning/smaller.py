"""Settings with which a run would fit into the memory of GPUs that is too small for it as it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from pipeline.config.train import AUTO, ZERO2, TrainConfig, divisors
from pipeline.errors import UserError
from pipeline.planning.auto import POLICIES, fastest, fits
from pipeline.planning.memory_plan import plan_memory
from pipeline.planning.plan import Tokens
from pipeline.planning.workload import Workload
from pipeline.training.deepspeed_config import accumulation

QUANTISED = "nf4"  # what needs least


def smaller_settings(
    work: Workload, ranks: int, model: nn.Module, tokens: Tokens, memory: int, node: int | None = None
) -> dict[str, str | int] | None:
    """Fields of the recipe with which training and answers fit by the plan, and their values; None where none do.

    Smaller batches come first, which change no result; then recomputation, which costs time; then a model on several
    ranks for answers; then quantised weights, whose answers differ. Of the batches it is the largest that fits.
    Arguments as of `fit_to_memory`.
    """
    for named, trial in _trials(work, ranks):
        for micro in _micro_batches(trial.train, ranks):
            train = trial.train if micro is None else trial.train.model_copy(update={"micro_batch": micro})
            try:
                chosen = trial.trained_with(fastest(trial.trained_with(train), ranks, model, tokens, memory, node)[0])
                if not fits(plan_memory(chosen, ranks, model, tokens, node).training, memory):
                    continue
                batch = _batch(chosen, ranks, model, tokens, memory, node)
            except UserError:  # these settings cannot be combined
                continue
            if batch is not None:
                batches = {"train.micro_batch": micro, "evaluate.batch": batch if batch < work.answers else None}
                return named | {name: value for name, value in batches.items() if value is not None}
    return None


def _trials(work: Workload, ranks: int) -> Iterator[tuple[dict[str, str | int], Workload]]:
    """The workload with ever more changes, each with the fields that differ from the recipe's."""
    most, train = POLICIES[-1], work.train
    again = {} if train.checkpointing in (AUTO, most) else {"train.checkpointing": most}
    divided = {"evaluate.engine": "sharded"} if ranks > 1 and work.evaluate.engine == "replicas" else {}
    quantised: dict[str, str] = {}
    if work.model.quantization == "none":
        quantised = {"model.quantization": QUANTISED}
        if train.deepspeed != ZERO2:  # ZeRO-3 cannot hold quantised weights, nor divide them for answers
            quantised["train.deepspeed"] = ZERO2
    trials: list[dict[str, str | int]] = [{}, {**again}, {**divided}, {**again, **divided}]
    trials += [{**quantised}, {**again, **quantised}] if quantised else []
    for number, named in enumerate(trials):
        if named not in trials[:number]:
            yield named, _with(work, named)


def _with(work: Workload, named: dict[str, str | int]) -> Workload:
    train = {"checkpointing": "train.checkpointing", "deepspeed": "train.deepspeed"}
    changed = work.trained_with(
        work.train.model_copy(update={field: named[name] for field, name in train.items() if name in named})
    )
    if "model.quantization" in named:
        changed = replace(changed, model=changed.model.model_copy(update={"quantization": QUANTISED}))
    return changed.evaluated_by("sharded") if "evaluate.engine" in named else changed


def _micro_batches(train: TrainConfig, ranks: int) -> list[int | None]:
    """Micro-batches to try, the largest first; None: the recipe's."""
    now, steps = accumulation(train, ranks)
    return [None, *(size for size in reversed(divisors(now * steps)) if size < now)]


def _batch(work: Workload, ranks: int, model: nn.Module, tokens: Tokens, memory: int, node: int | None) -> int | None:
    """The largest number of answers at once that fits: the recipe's, or that halved; None where one does not fit."""
    size = work.answers
    while size:
        if fits(plan_memory(replace(work, answers=size), ranks, model, tokens, node).evaluation, memory):
            return size
        size //= 2
    return None
