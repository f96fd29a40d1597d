"""A tiny prepared sequence, command lines run as forked processes that can be sabotaged, and what they leave behind.

Forked, because loading torch and DeepSpeed takes longer than everything that a tiny run does: the bench imports them
once and never uses them itself.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.console.progress import SPEEDS

LIMIT_S = 600  # a command that takes longer hangs
STEPS, TASKS = 6, 2
Sabotage = Callable[[], None]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    fault: str
    happens: str
    lost: str
    code: str
    passed: bool | None  # None: could not be tried here
    message: str = ""


@dataclass
class Process:
    """A command line in progress."""

    pid: int
    log: Path
    began: float

    def wait(self, limit_s: float = LIMIT_S) -> int:
        """Its exit code, minus the signal's number if one ended it; a process that hangs is killed."""
        until = time.monotonic() + limit_s
        while time.monotonic() < until:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise TimeoutError(f"the command of {self.log} took longer than {limit_s:.0f} s")

    def said(self, word: str = "error: ") -> str:
        """The last line of its output that contains `word`."""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if word in line]
        return lines[-1][lines[-1].index(word) :].removeprefix("error: ") if lines else ""


class Bench:
    """A folder in which runs are broken; `whole` is the run that nothing happened to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._number = 0
        for kind in ("runs", "logs", "recipes"):
            (folder / kind).mkdir(parents=True)
        done = self._fork(lambda: _prepare(folder), folder / "logs" / "prepare.log", {}).wait()
        assert done == 0, (folder / "logs" / "prepare.log").read_text()
        self.whole = self.recipe("whole")
        assert self.run(self.whole)[0] == 0, "the run without a fault failed"

    # ------------------------------------------------------------------ running

    def recipe(self, name: str, run: Path | None = None, tasks: int = TASKS, **changes: Any) -> Path:
        """Write a recipe whose run is `runs/NAME`; returns the file."""
        from tests.e2e.conftest import recipe_on

        fields = {"train__steps": STEPS, "train__save_steps": 2, "train__global_batch": 4, **changes}
        run = run or self.folder / "runs" / name
        recipe = recipe_on(self.folder, self.folder, tasks, **{**fields, "run_dir": str(run)})
        path = self.folder / "recipes" / f"{name}.yaml"
        recipe.dump_yaml(path)
        return path

    def start(self, arguments: Sequence[str], sabotage: Sabotage | None = None, **env: str) -> Process:
        """Run `python -m pipeline ARGUMENTS` in a process of its own; `sabotage` is called in it first."""

        def work() -> None:
            from pipeline.cli import commands as cli

            sys.argv = ["pipeline", *arguments]
            if sabotage is not None:
                sabotage()
            cli.main()

        self._number += 1
        return self._fork(work, self.folder / "logs" / f"{self._number:03d}-{arguments[0]}.log", env)

    def run(self, recipe: Path, sabotage: Sabotage | None = None, verb: str = "run") -> tuple[int, Process]:
        """Run a recipe to its end, whatever that is."""
        process = self.start([verb, str(recipe)], sabotage)
        return process.wait(), process

    def ranks(self, recipe: Path, sabotage: Callable[[int], None] | None = None, size: int = 2) -> list[Process]:
        """Start a recipe's training on ranks of this machine."""
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            port = server.getsockname()[1]
        return [
            self.start(
                ["train", str(recipe)],
                functools.partial(sabotage, rank) if sabotage else None,
                RANK=str(rank),
                WORLD_SIZE=str(size),
                LOCAL_RANK=str(rank),
                LOCAL_SIZE=str(size),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
            )
            for rank in range(size)
        ]

    def _fork(self, work: Callable[[], object], log: Path, env: dict[str, str]) -> Process:
        began = time.monotonic()
        pid = os.fork()
        if pid:
            return Process(pid, log, began)
        code = 1
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            for stream in (1, 2):
                os.dup2(output, stream)
            os.environ.update(env)
            work()
            code = 0
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    # ------------------------------------------------------------------ comparing

    def differences(self, recipe: Path, other: Path | None = None) -> list[str]:
        """What differs between a run and the one that nothing happened to: values, log, predictions, matrix."""
        mine, whole = results(recipe), results(other or self.whole)
        return [name for name in sorted({*mine, *whole}) if mine.get(name) != whole.get(name)]

    def stage(self, recipe: Path, number: int = 1, unfinished: bool = False) -> Path:
        """A stage's folder, counted from 1."""
        return run_of(recipe) / "stages" / f"{number:02d}-T{number - 1}{'.unfinished' if unfinished else ''}"


def run_of(recipe: Path) -> Path:
    """The run folder of a recipe's file."""
    from pipeline.config.load import load_recipe

    return load_recipe(recipe).run_path


def results(recipe: Path) -> dict[str, Any]:
    """Everything of a finished run that must not depend on what happened to it, by file."""
    run, found = run_of(recipe), dict[str, Any]()
    for path in sorted(run.glob("stages/*/prompts.safetensors")):
        found[str(path.relative_to(run))] = path.read_bytes()
    for path in sorted(run.glob("stages/*/metrics.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        kept = [{name: value for name, value in line.items() if name not in SPEEDS} for line in lines]
        found[str(path.relative_to(run))] = kept
    for path in sorted(run.glob("eval/*/*.jsonl")):
        found[str(path.relative_to(run))] = path.read_text()
    matrix = run / "matrix.json"
    found[matrix.name] = None
    if matrix.is_file():
        # Costs are measured: seconds, and operations of the first batch that a process meets.
        found[matrix.name] = {name: part for name, part in json.loads(matrix.read_text()).items() if name != "costs"}
    return found


@contextlib.contextmanager
def bench() -> Iterator[Bench]:
    """A bench in a folder that goes away."""
    for module in (
        "deepspeed",
        "transformers.models.llava.modeling_llava",
        "pipeline.cli.commands",
        "pipeline.check.sequence",
    ):
        importlib.import_module(module)  # once, see above
    from pipeline.sequence.record import RunRecord

    RunRecord.report = lambda self: None  # type: ignore[method-assign]  # drawing takes as long as all the rest
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    try:
        yield Bench(folder / "bench")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int = 4) -> Iterator[Path]:
    """A file system of its own in `folder`; raises PermissionError where that is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        raise PermissionError(f"no small file system can be mounted here ({mounted.stderr.strip()})")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)


def fill(folder: Path) -> Path:
    """Leave not a byte free on the file system of `folder`; returns the file that takes the room."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        for size in (1 << 16, 1 << 10, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
    return path


def _prepare(root: Path) -> None:
    from tests.e2e.conftest import prepare_project

    prepare_project(root, TASKS, train=9, test=3)
