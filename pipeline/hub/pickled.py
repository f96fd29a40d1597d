"""Conversion of weights that exist only as PyTorch's .bin files into safetensors, once per checkpoint.

`torch.load(weights_only=True)` reads tensors and refuses every other object in a pickle, so no code from the file is
run. The layout is that of safetensors' converter (one .safetensors per .bin, the same names of tensors), so the
fingerprint equals that of a published conversion.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import pickle
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.utils import WeakFileLock

from pipeline.errors import UserError
from pipeline.hub.weights import INDEX, PICKLED_INDEX, PICKLED_SINGLE, SINGLE, lacking, weights_of

log = logging.getLogger("pipeline.hub.pickled")
CONVERTED = "converted-weights"  # folder beside the Hub's cache
SETTINGS = ("*.json", "*.jinja", "*.model", "*.txt")  # configuration, tokenizer, processor and chat template


def with_safetensors(folder: Path) -> Path:
    """Return `folder`, or a folder in the cache with its weights as safetensors where they are .bin files.

    One process converts and the others wait for it on a lock. The result is renamed into place at the end, so an
    interrupted conversion starts again. Raises UserError when weights are missing, hold objects other than tensors,
    or cannot be written.
    """
    weights = weights_of(folder)
    if weights.missing:
        raise UserError(lacking(folder, weights.missing))
    if not weights.pickled:
        return folder
    target = _target(folder, weights.files)
    if not target.is_dir():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with WeakFileLock(target.with_suffix(".lock")):
                if not target.is_dir():
                    _convert(folder, weights.files, target)
        except OSError as error:
            raise UserError(
                f"The weights of {folder} are .bin files and cannot be converted into {target} ({error}). Make room "
                "there, or set HF_HOME to a folder on a disk that can be written to."
            ) from error
    _link_settings(folder, target)
    return target


def is_converted(folder: Path) -> bool:
    """Whether a folder's .bin files have been converted on this machine."""
    weights = weights_of(folder)
    return weights.pickled and weights.whole and _target(folder, weights.files).is_dir()


def _target(folder: Path, files: list[str]) -> Path:
    # In the Hub's cache a file is a symbolic link to a blob whose name is the hash of its content.
    paths = [(folder / name).resolve() for name in files]
    facts = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    name = folder.parent.parent.name if folder.parent.name == "snapshots" else folder.resolve().name
    return Path(constants.HF_HOME) / CONVERTED / f"{name}-{digest}"


def _convert(folder: Path, files: list[str], target: Path) -> None:
    log.warning("converting the .bin weights of %s into safetensors, once, in %s", folder, target)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        for name in files:
            _convert_file(folder / name, work / safe_name(name))
        if files != [PICKLED_SINGLE]:
            index: dict[str, Any] = json.loads((folder / PICKLED_INDEX).read_text("utf-8"))
            index["weight_map"] = {tensor: safe_name(name) for tensor, name in index["weight_map"].items()}
            (work / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")
        work.chmod(0o755)
        work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def safe_name(name: str) -> str:
    """`model-00001-of-00002.safetensors` for `pytorch_model-00001-of-00002.bin`."""
    return SINGLE if name == PICKLED_SINGLE else f"{Path(name).stem.removeprefix('pytorch_')}.safetensors"


def _convert_file(source: Path, target: Path) -> None:
    from safetensors.torch import save_file

    tensors = read_pickled(source)
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        where = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if where in seen else tensor  # save_file refuses tensors that share storage
        seen.add(where)
    save_file(tensors, target, metadata={"format": "pt"})
    os.chmod(target, 0o644)
    with target.open("rb") as file:
        os.fsync(file.fileno())
    _compare(source, tensors, target)


def read_pickled(path: Path) -> dict[str, Any]:
    """The tensors of a .bin file by name; UserError when it holds anything else or is damaged."""
    import torch

    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors: pickled code, which is never run. Give a revision or folder of the "
            "checkpoint with safetensors, or convert it where you trust it, with transformers' save_pretrained."
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is damaged or no PyTorch file ({first}). Fetch or copy it again.") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a {type(found).__name__}; expected a model's weights by name.")
    other = next((name for name, value in found.items() if not isinstance(value, torch.Tensor)), None)
    if other is not None:
        raise UserError(f"{path} holds '{other}', which is no tensor; expected a model's weights by name.")
    return dict(found)


def _compare(source: Path, tensors: dict[str, Any], target: Path) -> None:
    """Raise OSError unless the written file has the same names, shapes, types and bytes of tensors."""
    import torch
    from safetensors import safe_open

    with safe_open(str(target), framework="pt") as file:
        names = set(file.keys())
        same = names == tensors.keys()
        for name in names if same else ():
            one, other = tensors[name], file.get_tensor(name)
            same = same and one.shape == other.shape and one.dtype == other.dtype
            same = same and torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
    if not same:
        raise OSError(f"what was written of {source.name} is not what was read")


def _link_settings(folder: Path, target: Path) -> None:
    """Link the checkpoint's other files (configuration, tokenizer) into the converted folder."""
    for path in {path for pattern in SETTINGS for path in folder.glob(pattern)}:
        if not path.name.endswith(".index.json"):
            # Another process may make the same link; in a read-only cache the links exist since the conversion.
            with contextlib.suppress(FileExistsError, PermissionError):
                (target / path.name).symlink_to(path.absolute())
