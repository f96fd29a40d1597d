"""Atomic checkpoints inside a stage, with everything the next step depends on, for any number of ranks.

`stages/NN-task.unfinished/resume/step-00000123/` (in a benchmark `units/NAME.unfinished/...`) contains
`state.safetensors` (trainables, optimizer moments, the companion's state, random state of every rank) and `state.json`
(step, fingerprints of data and models, checksums). The folder is renamed to its name when all of it is on the disk. A
reader verifies the checksums and skips a damaged checkpoint for the one before (docs/design.md 3.5 to 3.7, 7.1).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from pipeline.config.base import LoopConfig
from pipeline.errors import PipelineError
from pipeline.files.atomic import empty_folder, sync_folder, write_synced
from pipeline.ranks.world import World, gather_objects, on_main
from pipeline.runs.layout import RESUME
from pipeline.training.optimizer_state import Moments, Optimised, read_moments

log = logging.getLogger(__name__)
FORMAT_VERSION = 1
TENSORS, META = "state.safetensors", "state.json"
UNFINISHED = ".tmp"
_NAME = re.compile(r"step-(\d{8})")


class DamagedError(PipelineError):
    """A checkpoint is incomplete or corrupt; the message says in which way."""


class RanksDisagreeError(PipelineError):
    """Ranks have different values of the trainables or the optimizer state; the message names the ranks."""


@dataclass(frozen=True)
class StepState:
    """A stage after `step` optimizer steps."""

    step: int
    values: dict[str, Tensor]  # the trainables by name, float32
    moments: Moments
    random: list[dict[str, Tensor]]  # states of torch's generators, for each rank of the run that saved
    meta: dict[str, Any]
    rest: dict[str, Tensor] = field(default_factory=dict)  # the engine's, see `Engine.rest`

    @property
    def shared(self) -> dict[str, Tensor]:
        """All tensors that are equal on every rank, by their names in the file."""
        parts = {"value": self.values, **self.moments, "rest": self.rest}
        return {f"{kind}.{name}": value for kind, part in parts.items() for name, value in part.items()}


class Savable(Optimised, Protocol):
    """What is saved of an engine besides the moments of its optimizer."""

    def values(self) -> dict[str, Tensor]: ...

    def rest(self) -> dict[str, Tensor]: ...


class StepSaver:
    """Saves checkpoints of the stage in progress; all ranks call it together at a step boundary."""

    def __init__(self, engine: Savable, world: World, folder: Path, config: LoopConfig, facts: dict[str, Any]) -> None:
        """Prepare saving; nothing is written yet.

        Args:
            engine: the engine whose state is saved.
            world: the ranks.
            folder: the folder of the unfinished stage.
            config: how often to save, and how many checkpoints to keep.
            facts: further content of state.json, which `newest` returns as `StepState.meta`.
        """
        self.engine, self.world, self.folder, self.config, self.facts = engine, world, folder / RESUME, config, facts
        self._began = self._last = time.monotonic()  # the system clock may jump
        self._saved: int | None = None

    def is_due(self, step: int) -> bool:
        """Whether this rank finds a checkpoint due after `step` steps; clocks differ, so the ranks have to agree."""
        if self.config.save_steps is not None and step % self.config.save_steps == 0:
            return True
        minutes = self.config.save_minutes
        return self.world.main and minutes is not None and time.monotonic() - self._last >= 60 * minutes

    def save(self, step: int) -> str | None:
        """Save the state after `step` steps; returns None, or on all ranks the sentence that says why it failed.

        A failed write, such as on a full disk, does not end the training: earlier checkpoints stay, and the next save
        may succeed. Raises RanksDisagreeError on all ranks instead of saving a state that differs between ranks.
        """
        engine, random = self.engine, gather_objects(random_state(self.world.device))
        facts = {**self.facts, "seconds": round(self.facts.get("seconds", 0) + time.monotonic() - self._began, 1)}
        state = StepState(step, engine.values(), read_moments(engine), random, facts, engine.rest())
        prints = gather_objects(_digest(state.shared))
        if len(set(prints)) > 1:
            odd = [rank for rank, found in enumerate(prints) if found != prints[0]]
            raise RanksDisagreeError(
                f"After step {step} rank {', '.join(map(str, odd))} holds other values than rank 0, which a fault of "
                "the machine or a method that treats ranks differently can cause. Nothing was saved; the same command "
                f"resumes from {self.newest_name()}."
            )

        def write() -> str | None:
            try:
                began = time.perf_counter()
                path = write_step(self.folder, state, self.config.keep)
            except (OSError, SafetensorError) as error:
                return f"The state after step {step} could not be saved in {self.folder} ({error})."
            size = sum(file.stat().st_size for file in path.iterdir())
            log.info("saved after step %d: %.1f kB in %.0f ms", step, size / 1e3, 1e3 * (time.perf_counter() - began))
            return None

        trouble = on_main(self.world, write)
        self._last = time.monotonic()
        self._saved = self._saved if trouble else step
        if trouble and self.world.main:
            log.warning("%s Training continues; the newest checkpoint is %s.", trouble, self.newest_name())
        return trouble

    def newest_name(self) -> str:
        """The name of the newest checkpoint of this or an earlier attempt, for messages."""
        found = list(_steps(self.folder))
        return found[-1].name if found else "the stage's start"


def write_step(folder: Path, state: StepState, keep: int) -> Path:
    """Write a checkpoint into `folder` and remove all but the newest `keep`; returns its folder.

    Raises OSError when it cannot be written; earlier checkpoints stay then.
    """
    final = folder / f"step-{state.step:08d}"
    work = final.with_name(final.name + UNFINISHED)
    _sweep(folder)
    empty_folder(work)
    tensors = state.shared
    for rank, part in enumerate(state.random):
        tensors |= {f"random.{rank}.{name}": value for name, value in part.items()}
    content = save({name: value.contiguous() for name, value in tensors.items()})
    meta = {"format": FORMAT_VERSION, "step": state.step, **state.meta, "sha256": hashlib.sha256(content).hexdigest()}
    try:
        write_synced(work / TENSORS, content)
        write_synced(work / META, json.dumps({**meta, "checksum": _checksum(meta)}, indent=2).encode() + b"\n")
        sync_folder(work)
        if final.exists():  # a damaged one, or one of steps repeated after a damaged one
            _remove(final)
        work.rename(final)
    except OSError:
        shutil.rmtree(work, ignore_errors=True)
        raise
    sync_folder(folder)
    for old in list(_steps(folder))[:-keep]:
        _remove(old)
    return final


def newest(folder: Path) -> StepState | None:
    """The newest intact checkpoint in the folder of an unfinished stage, None when there is none.

    Damaged checkpoints are skipped with a warning.
    """
    for path in reversed(list(_steps(folder / RESUME))):
        try:
            return read_step(path)
        except DamagedError as error:
            log.warning("The checkpoint %s is skipped: %s. The one before it is used.", path, error)
    return None


def read_step(path: Path) -> StepState:
    """The checkpoint in a folder; DamagedError when a checksum does not match or a file cannot be read."""
    try:
        meta = json.loads((path / META).read_text("utf-8"))
        content = (path / TENSORS).read_bytes()
        checksum = meta.pop("checksum")
        if checksum != _checksum(meta):
            raise DamagedError(f"{META} is not what was written (its checksum)")
        if meta["format"] != FORMAT_VERSION:
            raise DamagedError(f"it has format {meta['format']}, expected {FORMAT_VERSION}")
        if hashlib.sha256(content).hexdigest() != meta["sha256"]:
            raise DamagedError(f"{TENSORS} is not what was written (its sha256)")
        tensors = load(content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise DamagedError(f"it cannot be read ({type(error).__name__}: {error})") from error
    parts = _parts(tensors)
    values, rest, random = (parts.pop(kind, {}) for kind in ("value", "rest", "random"))
    by_rank = _parts(random)
    states = [by_rank[str(rank)] for rank in range(len(by_rank))]
    return StepState(meta["step"], values, parts, states, meta, rest)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of this process's torch generators, the only ones that training may draw from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["device"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(states: list[dict[str, Tensor]], rank: int, device: torch.device) -> None:
    """Restore the generators of this rank; a rank beyond those that saved keeps its own state."""
    if rank >= len(states):
        return
    torch.set_rng_state(states[rank]["cpu"])
    if device.type == "cuda" and "device" in states[rank]:
        torch.cuda.set_rng_state(states[rank]["device"], device)


def cut_log(path: Path, step: int) -> None:
    """Remove the lines of a metrics.jsonl that belong to steps after `step` or are incomplete."""
    kept = []
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text("utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
        temporary = path.with_name(path.name + UNFINISHED)
        temporary.write_text("".join(kept), "utf-8")
        temporary.replace(path)


def _steps(folder: Path) -> Iterator[Path]:
    """The checkpoints in a folder, oldest first."""
    yield from sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))


def _sweep(folder: Path) -> None:
    """Remove folders that a killed process was writing or removing."""
    for path in folder.glob(f"step-*{UNFINISHED}"):
        shutil.rmtree(path, ignore_errors=True)


def _remove(path: Path) -> None:
    # Rename first, so that a kill during the removal leaves no incomplete folder with a checkpoint's name.
    gone = path.with_name(path.name + ".old" + UNFINISHED)
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _parts(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors named `part.name`, as {part: {name: tensor}}."""
    found: dict[str, dict[str, Tensor]] = {}
    for whole, value in tensors.items():
        part, _, name = whole.partition(".")
        found.setdefault(part, {})[name] = value
    return found


def _checksum(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _digest(tensors: dict[str, Tensor]) -> str:
    """A hash of tensors that treats -0 and 0 as equal, because a sum over ranks turns -0 into 0."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update((tensors[name] + 0.0).contiguous().numpy().tobytes())
    return digest.hexdigest()
