"""The kept artefacts, a working folder made of copies of them, and how numbers of two machines are compared.

On the platform of `origin.json` (processor, its instructions, versions of torch and transformers) what is trained has
to be what it was, bit for bit. Elsewhere matrix products add in another order, which changes the last bits. Trained
with other instructions of the same processor (`ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41
MKL_ENABLE_INSTRUCTIONS=SSE4_2`), the curves differed by up to 1.2e-6 of a loss and 1.5e-5 of the norm of a learned
tensor in float32, in bfloat16 by up to 2.6e-3 and 1.5e-2. The bounds leave room for other processors and versions, and
stay far below what a changed rate, order, selection or initial value makes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import platform
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.cli import main
from tests.processes import PROJECT

KEPT = Path(__file__).parent / "kept"
ORIGIN = KEPT / "origin.json"
WORKING = ("models", "data", "recipes", "runs", "adapters")  # what a working folder gets a copy of
TENSORS = "prompts.safetensors"


@dataclass(frozen=True)
class Tolerance:
    """How far numbers may be from the kept ones."""

    loss: float = 1e-4  # as a share of the number
    value: float = 1e-3  # as a share of a tensor's norm
    floor: float = 1e-5  # of numbers that are next to 0, where a share says nothing
    steps: int | None = None  # of the first stage that are compared; None: all, and the tensors that are left


ELSEWHERE, ELSEWHERE_BFLOAT16 = Tolerance(), Tolerance(2e-2, 1e-1, 1e-3)
# B starts at zero, so its first gradients are next to it, and Adam's steps are as long for rounding noise as for a
# gradient: with other instructions (AVX2 in place of AVX512) the code that made the curves leaves them after eight
# steps, and has another loss by a half in the second stage.
ELSEWHERE_LOW_RANK = Tolerance(1e-3, steps=5)


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def result(self) -> dict[str, Any]:
        """What `--json` prints on the last line."""
        return json.loads(self.out.splitlines()[-1])


def program(*arguments: str | Path) -> Done:
    """`python -m pipeline` with these arguments, in this process and with nothing left behind in its environment."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    before = dict(os.environ)
    os.environ["PYTHONPATH"] = str(PROJECT)  # launched ranks start in the working folder
    argv = ["pipeline", *map(str, arguments)]
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        finally:
            os.environ.clear()
            os.environ.update(before)  # joining a process group sets RANK, with which the next command would be a rank
    return Done(code, out.getvalue(), err.getvalue())


def succeeded(*arguments: str | Path) -> Done:
    """The same, for a command that has to succeed."""
    done = program(*arguments)
    if done.code:
        raise AssertionError(f"{' '.join(map(str, arguments))} ended with {done.code}:\n{done.out}\n{done.err}")
    return done


def working_folder(folder: Path) -> Path:
    """Copies of models, prepared data, recipes, runs and adapters, whose paths are relative to this folder."""
    for name in WORKING:
        shutil.copytree(KEPT / name, folder / name)
    return folder


def this_platform() -> dict[str, Any]:
    """What the last bits of a training depend on."""
    return {
        "processor": _processor("model name"),
        "flags": hashlib.sha256(" ".join(sorted(_processor("flags").split())).encode()).hexdigest()[:16],
        "machine": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        **{package: metadata.version(package) for package in ("torch", "transformers", "deepspeed")},
    }


def _processor(field: str) -> str:
    """What Linux says of the first processor; elsewhere its name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(field):
                return line.partition(":")[2].strip()
    return platform.processor()


def tolerance(part: str, elsewhere: Tolerance = ELSEWHERE) -> Tolerance | None:
    """How far numbers may be here from those of this part (artefacts or golden); None: they have to be the same."""
    return None if is_same_platform(part) else elsewhere


def is_same_platform(part: str) -> bool:
    """Whether this is the platform that made this part."""
    return this_platform() == json.loads(ORIGIN.read_text("utf-8"))[part]["platform"]


def learned(folder: Path) -> dict[str, Tensor]:
    """The tensors of a finished stage or unit."""
    return load_file(folder / TENSORS)


def numbers_of(folder: Path) -> dict[str, list[float]]:
    """The numbers in metrics.jsonl of a stage or unit by their name, without those of the machine's speed."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    return {name: [line[name] for line in lines] for name in lines[0] if not name.endswith("_per_s")}


def assert_same_values(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], of: str, within: Tolerance | None
) -> None:
    """Tensors are the expected ones, bit for bit where no tolerance is given."""
    assert found.keys() >= expected.keys(), f"{of} lacks {sorted(expected.keys() - found.keys())}"
    for name, value in expected.items():
        got = found[name]
        assert got.shape == value.shape, f"{of}: {name} has another shape"
        if within is None:
            assert torch.equal(got, value), f"{of}: {name} differs by up to {(got - value).abs().max():.1e}"
        else:
            away = float((got - value).norm() / value.norm().clamp(min=1e-12))
            assert away < within.value, f"{of}: {name} is {away:.1e} of its norm away"


def assert_same_numbers(
    found: Mapping[str, list[float]], expected: Mapping[str, list[float]], of: str, within: Tolerance | None
) -> None:
    """The numbers of every step are the expected ones; further ones may have come in since."""
    for name, values in expected.items():
        assert name in found, f"{of}: {name} is gone from metrics.jsonl"
        assert len(found[name]) == len(values), f"{of}: {len(found[name])} lines of metrics.jsonl, were {len(values)}"
        for step, (got, value) in enumerate(zip(found[name], values, strict=True), start=1):
            bound = 0.0 if within is None else within.loss * abs(value) + within.floor
            assert abs(got - value) <= bound, f"{of}: {name} of line {step} is {got!r}, was {value!r}"


def assert_contains(found: Any, expected: Any, place: str = "") -> None:
    """Fields are the expected ones; further fields may have come in since."""
    if isinstance(expected, dict):
        assert isinstance(found, dict), f"{place}: {found!r}"
        for name, value in expected.items():
            assert name in found, f"{place}.{name} is gone"
            assert_contains(found[name], value, f"{place}.{name}".lstrip("."))
    elif isinstance(expected, list):
        assert isinstance(found, list), f"{place}: {found!r}"
        assert len(found) == len(expected), f"{place} has {len(found)} items, had {len(expected)}"
        for number, (one, value) in enumerate(zip(found, expected, strict=True)):
            assert_contains(one, value, f"{place}.{number}")
    else:
        assert found == expected, f"{place} is {found!r}, was {expected!r}"
