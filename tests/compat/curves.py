"""Short trainings of every method of both halves, and the losses and values that they lead to."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from tests.compat.kept import (
    KEPT,
    TENSORS,
    Tolerance,
    assert_same_numbers,
    assert_same_values,
    learned,
    numbers_of,
    succeeded,
)

CLIP = "clip"  # what the curves of the benchmark are called together

TRAINED = {"train.projector": "trained", "train.lr_projector": 0.01}
METHODS = ("modalprompt", "sequential", "independent", "joint")
# Of every method and of the switches that the official code has otherwise: what `--set` changes of recipes/curves.yaml.
CURVES: dict[str, dict[str, Any]] = {
    **{name: {"method.name": name} for name in METHODS},
    **{f"{name}-projector": {"method.name": name, **TRAINED} for name in METHODS},
    "compat": {
        "data.scoring": "compat",
        "data.validation_share": 0,
        "model.template": "vicuna_v1",
        "model.image_padding": "square",
        "method.gate": None,
        "method.text_only": "skip",
        "train.schedule": "constant",
        "train.warmup": 0.3,
        "train.warmup_curve": "log",
    },
    "after-image": {"method.insertion": "after_image"},
    "previous": {"method.init": "previous"},
    "zero-3": {"train.deepspeed": "ds_configs/zero3.json"},
    "zero-3-projector": {"train.deepspeed": "ds_configs/zero3.json", **TRAINED},
}
# Of further ways to train; in the slow tests, for together they take as long as all the others.
FURTHER: dict[str, dict[str, Any]] = {
    "before-image": {"method.insertion": "before_image"},
    "normal": {"method.init": "normal", "method.prototype_weight": 0.5},
    "all": {"method.selection": "all"},
    "current": {"method.selection": "current"},
    "oracle": {"method.selection": "oracle"},
    "image-weight": {"method.image_weight": 0.9, "method.k": 1, "method.gate": None},
    "length-buckets": {"train.length_buckets": True},
    "kept-features": {"train.vision_features": "kept"},
    "bfloat16": {"model.dtype": "bfloat16"},
    "micro-batch": {"train.micro_batch": 2, "train.checkpointing": "full"},
    "optimizer": {
        "train.schedule": "linear",
        "train.weight_decay": 0.1,
        "train.betas": [0.8, 0.95],
        "train.eps": 1e-6,
        "train.clip": None,
    },
    "zero-2": {"train.deepspeed": "ds_configs/zero2.json"},
}

SMALL = 512  # numbers in a tensor that is kept whole; of a larger one there is its hash


@dataclass(frozen=True)
class Curve:
    """A training: the numbers of every step by their name, and the tensors that it left."""

    numbers: dict[str, list[float]]
    values: dict[str, Tensor]

    @property
    def hashes(self) -> dict[str, str]:
        """Of every tensor's bytes."""
        return {name: hash_of(value) for name, value in sorted(self.values.items())}


def hash_of(value: Tensor) -> str:
    """Sixteen hexadecimal digits of a float32 tensor's bytes."""
    return hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()[:16]


def curves_of_sequence(name: str) -> dict[str, Curve]:
    """Train the variant of that name in the working folder; its curves by `name/stage`."""
    changes = {**CURVES, **FURTHER}[name]
    run = Path("runs") / f"curve-{name}"
    told = [f"{field}={json.dumps(value)}" for field, value in {**changes, "run_dir": str(run)}.items()]
    succeeded("train", "recipes/curves.yaml", *(part for text in told for part in ("--set", text)))
    return _curves(run / "stages", name)


def curves_of_benchmark() -> dict[str, Curve]:
    """Train every method on CLIP in the working folder; the curves by `clip/unit`."""
    succeeded("train", "recipes/clip_curves.yaml")
    return _curves(Path("runs/clip-curves/units"), CLIP)


def _curves(folder: Path, name: str) -> dict[str, Curve]:
    found = sorted(path.parent for path in folder.glob(f"*/{TENSORS}"))
    return {f"{name}/{path.name}": Curve(numbers_of(path), learned(path)) for path in found}


class Golden:
    """The kept curves: `curves.json` has their numbers, the hashes of their tensors and the commit that made them."""

    def __init__(self, folder: Path = KEPT / "golden") -> None:
        self.folder = folder
        self.curves: dict[str, dict[str, Any]] = {}
        self.values: dict[str, Tensor] = {}
        if (folder / "curves.json").is_file():
            self.curves = json.loads((folder / "curves.json").read_text("utf-8"))
            self.values = load_file(folder / "values.safetensors")

    def names(self, of: str) -> list[str]:
        """The curves of a variant that are kept."""
        return [name for name in self.curves if name.startswith(f"{of}/")]

    def add(self, curves: dict[str, Curve], commit: str) -> None:
        """Keep further curves."""
        for name, curve in curves.items():
            self.curves[name] = {"commit": commit, "hashes": curve.hashes, "numbers": curve.numbers}
            small = {tensor: value for tensor, value in curve.values.items() if value.numel() <= SMALL}
            self.values |= {f"{name}/{tensor}": value for tensor, value in small.items()}

    def save(self) -> None:
        """Write what is kept."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(kept)}" for name, kept in sorted(self.curves.items()))
        (self.folder / "curves.json").write_text(f"{{\n{lines}\n}}\n", "utf-8")
        (self.folder / "values.safetensors").write_bytes(save(dict(sorted(self.values.items()))))

    def compare(self, name: str, curve: Curve, within: Tolerance | None) -> None:
        """Fail where a curve is not the kept one, bit for bit where no tolerance is given."""
        kept = self.curves[name]
        assert_same_numbers(curve.numbers, kept["numbers"], name, within)
        beginning = f"{name}/"
        values = {n.removeprefix(beginning): v for n, v in self.values.items() if n.startswith(beginning)}
        assert_same_values(curve.values, values, name, within)
        if within is None:
            assert curve.hashes == kept["hashes"], f"{name}: tensors that are not kept whole have changed"
