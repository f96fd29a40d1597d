"""What the routing of a large adapter has made of all its tasks together, kept beside their states.

Fitting a router to thousands of kept keys takes seconds, and reads all of them. The file is a copy of what follows from
the states: without it, or where it belongs to other states, the router is fitted again.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pipeline.files.atomic import replacing
from pipeline.prompts.calibration import Calibration
from pipeline.prompts.pool import PromptPool
from pipeline.prompts.routing import Routing

log = logging.getLogger(__name__)
FITTED = "routing.safetensors"
LARGE = 64  # tasks from which on the file is written; below, fitting takes about a second
VERSION = "2"  # increase when a router's fit changes, so that earlier files are not used


def write_fitted(routing: Routing, pool: PromptPool, content: str, path: Path) -> bool:
    """Write the fit of a large pool that keeps keys; returns whether there is one. `content` identifies the states."""
    path.unlink(missing_ok=True)
    if not routing.keeps_keys or len(pool) < LARGE:
        return False
    tensors, said = {}, {"version": VERSION, "content": content}
    for name, made in routing.fitted(pool.states).items():
        if isinstance(made, Calibration):
            tensors["temperature"] = torch.tensor(made.temperature, dtype=torch.float64)
            said["calibration"] = name
        elif isinstance(made, dict):
            tensors |= {f"fitted.{key}": value.contiguous() for key, value in made.items()}
            said["router"] = name
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=said)
    return True


def use_fitted(routing: Routing, pool: PromptPool, content: str, path: Path) -> None:
    """Use a fit that `write_fitted` wrote for these states; nothing happens where it is of others or cannot be read."""
    try:
        with safe_open(str(path), framework="pt") as file:
            said = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        if said["version"] != VERSION or said["content"] != content:
            raise ValueError("it belongs to other states or another version")
        fitted = {name.removeprefix("fitted."): value for name, value in tensors.items() if name != "temperature"}
        made: dict[str, Any] = {said["router"]: fitted}
        made[said["calibration"]] = Calibration(float(tensors["temperature"]))
        if not all(bool(value.isfinite().all()) for value in tensors.values()):
            raise ValueError("it has numbers that are not finite")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        log.warning("%s is not used (%s); the router is fitted anew.", path, error)
        return
    routing.use(pool.states, made)
