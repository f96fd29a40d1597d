"""Adapters as somebody else may have changed them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pipeline.adapter.meta import META, TENSORS
from pipeline.files.atomic import sha256


def with_tensors(folder: Path, changes: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of an adapter as somebody else may have, with the checksum that belongs to them."""
    path = folder / TENSORS
    with safe_open(str(path), framework="pt") as file:
        said, tensors = file.metadata(), {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    changes(tensors)
    save_file(tensors, path, metadata=said)
    meta = json.loads((folder / META).read_text())
    (folder / META).write_text(json.dumps({**meta, "sha256": sha256(path)}))
