"""Progress of training, written to metrics.jsonl and shown as a bar on a terminal or as log lines; bars for answers."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

log = logging.getLogger("pipeline.training.loop")

IN_BAR = "in_bar"  # attribute of a log record: True where a bar on the terminal shows the same numbers
REDRAW_S = 0.2
SPEEDS = ("samples_per_s", "answer_tokens_per_s")  # the fields of a line of metrics.jsonl that depend on the machine

T = TypeVar("T")


@dataclass(frozen=True)
class Progress:
    """One line of metrics.jsonl; speeds are over all ranks, since the line before."""

    step: int
    loss: float
    terms: dict[str, float]  # terms of the loss by name
    lr: float
    samples_per_s: float
    answer_tokens_per_s: float | None = None  # None where answers are not text, as in classification with CLIP

    def numbers(self) -> dict[str, float]:
        """All fields but the step, by name."""
        speeds = {name: getattr(self, name) for name in SPEEDS if getattr(self, name) is not None}
        return {"loss": self.loss, **self.terms, "lr": self.lr, **speeds}

    def speeds(self) -> str:
        """The speeds as text."""
        tokens = "" if self.answer_tokens_per_s is None else f"{self.answer_tokens_per_s:.1f} tokens/s  "
        return f"{tokens}{self.samples_per_s:.1f} samples/s"


class Estimate:
    """Estimates the time until step `total`; the mean leaves out the first step, which includes loading and warm-up."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.first: tuple[int, float] | None = None

    def left(self, step: int, now: float) -> float:
        """Seconds that are left after `step` steps at the time `now`; NaN until a second step is done."""
        if self.first is None:
            self.first = (step, now)
        done = step - self.first[0]
        return (now - self.first[1]) / done * (self.total - step) if done else math.nan


class ProgressLog:
    """Counts steps, samples and answer tokens of a training, writes them to `file` and shows a progress bar.

    Only rank 0 (`main`) writes and shows. As a context manager it starts and stops the bar.

    Args:
        file: metrics.jsonl, to which lines are appended.
        name: label of the bar.
        total: number of steps of the training.
        main: whether this process is rank 0.
        counts_tokens: whether answer tokens are counted beside samples.
        console: where the bar is shown; None: the error output.
    """

    def __init__(
        self,
        file: Path,
        name: str,
        total: int,
        main: bool,
        counts_tokens: bool = True,
        console: Console | None = None,
    ) -> None:
        self.file, self.total, self.main, self.counts_tokens = file, total, main, counts_tokens
        self.step, self.tokens, self.samples, self.since = 0, 0.0, 0.0, time.perf_counter()
        self.estimate = Estimate(total)
        self.bar = _bar(console, TextColumn("{task.fields[told]}")) if main else None
        self.told, self.drawn = "", -math.inf
        if self.bar is not None:
            self.task = self.bar.add_task(name, total=total, told="")

    def __enter__(self) -> ProgressLog:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def moved(self, step: int, tokens: float, samples: float) -> None:
        """Count a step: its number, and its answer tokens and samples over all ranks."""
        self.step, self.tokens, self.samples = step, self.tokens + tokens, self.samples + samples
        self.estimate.left(step, time.perf_counter())  # the first call sets the time from which the mean counts
        self._draw()

    def report(self, loss: float, terms: dict[str, float], lr: float) -> Progress:
        """Return the step's line; rank 0 writes it to the file, and to the log where no bar shows it."""
        now = time.perf_counter()
        seconds = max(now - self.since, 1e-9)
        tokens_per_s = self.tokens / seconds if self.counts_tokens else None
        progress = Progress(self.step, loss, terms, lr, self.samples / seconds, tokens_per_s)
        self.tokens, self.samples, self.since = 0.0, 0.0, now
        if self.main:
            self._write(progress)
        return progress

    def _draw(self) -> None:
        now = time.perf_counter()
        if self.bar is not None and (now - self.drawn >= REDRAW_S or self.step == self.total):
            told = f"{self.told}  ETA {clock(self.estimate.left(self.step, now))}" if self.told else ""
            self.bar.update(self.task, completed=self.step, told=told, refresh=True)
            self.drawn = now

    def _write(self, progress: Progress) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": progress.step, **progress.numbers()}) + "\n")
        eta = clock(self.estimate.left(progress.step, time.perf_counter()))
        terms = ", ".join(f"{name.removeprefix('loss_')} {value:.4f}" for name, value in progress.terms.items())
        log.info(
            f"step {progress.step}/{self.total}  loss {progress.loss:.4f} ({terms})  lr {progress.lr:.2e}  "
            f"{progress.speeds()}  ETA {eta}",
            extra={IN_BAR: self.bar is not None},
        )
        self.told, self.drawn = f"loss {progress.loss:.4f}  {progress.speeds()}", -math.inf
        self._draw()


def counted(
    parts: Iterable[Sequence[T]], total: int, name: str | None, console: Console | None = None
) -> Iterator[Sequence[T]]:
    """Yield the parts unchanged and show a bar labelled `name` that counts their items up to `total`; None: no bar."""
    bar = _bar(console) if name is not None else None
    if bar is None:
        yield from parts
        return
    with bar:
        task = bar.add_task(str(name), total=total)
        for part in parts:
            yield part
            bar.update(task, advance=len(part), refresh=True)


def clock(seconds: float) -> str:
    """Seconds as "m:ss", or "h:mm:ss" from an hour on; "-:--" where they are not finite."""
    if not math.isfinite(seconds):
        return "-:--"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def _bar(console: Console | None, *columns: TextColumn) -> Bar | None:
    """A bar on the error output, None where that is no terminal.

    The caller redraws it. rich's refresh thread is off: a DataLoader worker that is forked while this thread holds a
    lock would inherit a lock that nobody releases.
    """
    console = console or Console(stderr=True)
    if not console.is_terminal or console.is_dumb_terminal:
        return None
    shown = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=None), MofNCompleteColumn(), *columns)
    return Bar(*shown, console=console, auto_refresh=False, expand=True, redirect_stdout=sys.stdout.isatty())
