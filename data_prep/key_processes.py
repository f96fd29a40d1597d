"""CLIP keys by several processes on one machine, each on its own GPU, or all on CPUs where there is no GPU.

One process cannot keep several GPUs busy, because its threads share the interpreter's lock. Each process runs
`data_prep keys --share N/COUNT`, which writes keys shard by shard; the caller merges them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import EXIT_USER, PipelineError, UserError

if TYPE_CHECKING:
    from pipeline.config.recipe import Recipe

PROJECT = Path(__file__).resolve().parents[1]
SAID = 2000  # characters of a failed process's error output that are shown


def keys_by_processes(recipe: Recipe, processes: int) -> None:
    """Compute the missing keys of a recipe's shards, which must all exist.

    Raises UserError when a process meets bad input, or when there are fewer GPUs than processes; PipelineError when one
    ends with another error message, such as a full disk; RuntimeError when one ends in any other way. Keys that other
    processes computed are kept.
    """
    devices = _devices(processes)
    workers = max(1, recipe.data.workers // processes)
    with tempfile.TemporaryDirectory(prefix="pipeline-keys-") as folder:
        path = Path(folder) / "recipe.yaml"
        recipe.dump_yaml(path)
        started = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "data_prep",
                    "keys",
                    str(path),
                    "--share",
                    f"{number + 1}/{processes}",
                    "--set",
                    f"data.workers={workers}",
                ],
                env=_environment(device),
                stderr=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                text=True,
            )
            for number, device in enumerate(devices)
        ]
        try:
            said = [process.communicate()[1] for process in started]
        finally:
            for process in started:
                if process.poll() is None:
                    process.terminate()
                    process.wait()
    for process, words in zip(started, said, strict=True):
        last = (words.strip().splitlines() or [""])[-1]
        if process.returncode and last.startswith("error: "):
            raise (UserError if process.returncode == EXIT_USER else PipelineError)(last.removeprefix("error: "))
        if process.returncode:
            raise RuntimeError(f"A process that computed keys ended with {process.returncode}: {words[-SAID:]}")


def _devices(processes: int) -> list[str | None]:
    """The value of CUDA_VISIBLE_DEVICES for each process: one of this process's devices, as it is named here."""
    import torch

    count = torch.cuda.device_count()
    if not count:
        return [None] * processes
    if processes > count:
        raise UserError(f"--gpus is {processes}, and {count} GPUs are visible here; expected at most {count}.")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(count)]
    return [name.strip() for name in names[:processes]]


def _environment(device: str | None) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, **({} if device is None else {"CUDA_VISIBLE_DEVICES": device})}
