"""Short trainings of every method of both halves, and the losses and values that they lead to."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
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
DPL = "dpl"  # those of dpl and of its search, which came later
CLASSES = {"red_panda": (160, 20, 20), "golf ball": (160, 160, 160), "tench": (20, 120, 20), "organ": (90, 60, 0)}

TRAINED = {"train.projector": "trained", "train.lr_projector": 0.01}
METHODS = ("modalprompt", "sequential", "independent", "joint")
LORA = {"method.rank": 2, "method.alpha": 4.0}
# Methods on low-rank updates; what they learn is compared with a re-computation in tests/parity as well.
LOW_RANK: dict[str, dict[str, Any]] = {
    **{name: {"method.name": name, **LORA} for name in ("task_lora", "lora", "lora_merged", "disco", "core_moe")},
    "olora": {"method.name": "olora", **LORA},
    "moelora": {"method.name": "moelora", "method.rank": 4, "method.experts": 2},
    "hide": {"method.name": "hide", **LORA},
    "ewc": {"method.name": "ewc", "method.fisher_samples": 4, **LORA},
    "lwf": {"method.name": "lwf", **LORA},
    "independent-low-rank": {
        "method.name": "independent",
        "method.prompt_length": 10,
        "method.part": {"name": "low_rank", "rank": 2},
    },
}
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
    "modular": {"method.name": "modular", "method.depth": 2, "method.add": 2, "method.remove": 1},
    "l2p": {"method": {"name": "l2p", "pool_size": 4, "pool_length": 2, "chosen": 2}},
    "dualprompt": {"method": {"name": "dualprompt", "general_layers": [0], "task_layers": [0, 1]}},
    "coda": {"method": {"name": "coda", "components": 2, "component_length": 2, "layers": [0, 1]}},
    "prefix": {"method": {"name": "sequential", "part": {"name": "prefix", "prefix_length": 3}}},
    "previous": {"method.init": "previous"},
    "zero-3": {"train.deepspeed": "ds_configs/zero3.json"},
    "zero-3-projector": {"train.deepspeed": "ds_configs/zero3.json", **TRAINED},
}
# Of further ways to train; in the slow tests, for together they take as long as all the others.
FURTHER: dict[str, dict[str, Any]] = {
    **LOW_RANK,
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
    former = {"modalprompt": "prototype", "modular": "prototype", "task_lora": "mean"}  # when the curves were kept
    if (method := changes.get("method.name", "modalprompt")) in former:
        changes = {"method.router": former[method], **changes}
    run = Path("runs") / f"curve-{name}"
    told = [f"{field}={json.dumps(value)}" for field, value in {**changes, "run_dir": str(run)}.items()]
    succeeded("train", "recipes/curves.yaml", *(part for text in told for part in ("--set", text)))
    return _curves(run / "stages", name)


def curves_of_benchmark() -> dict[str, Curve]:
    """Train every method on CLIP in the working folder; the curves by `clip/unit`."""
    succeeded("train", "recipes/clip_curves.yaml")
    return _curves(Path("runs/clip-curves/units"), CLIP)


def curves_of_dpl() -> dict[str, Curve]:
    """Train dpl in the working folder, on images that are drawn anew, and search its lengths.

    The search counts itself, not the unit that is trained with what it finds: which of two almost equal options is the
    better one may depend on the machine.
    """
    save_pictures(Path("datasets"))
    succeeded("train", "recipes/dpl_curves.yaml")
    run = Path("runs/dpl-curves")
    (search,) = (run / "searches").iterdir()
    found = json.loads((search / "search.json").read_text("utf-8"))["alphas"]
    alphas = {f"alphas_{tower}": torch.tensor(values[-1]) for tower, values in found.items()}
    units = {name: curve for name, curve in _curves(run / "units", DPL).items() if "searched" not in name}
    return units | {f"{DPL}/search": Curve(numbers_of(search), alphas)}


def save_pictures(root: Path) -> None:
    """Pictures of four classes with a split file, in CoOp's layout; each class has a colour of its own, and noise."""
    folder = root / "toys" / "images"
    folder.mkdir(parents=True)
    parts: dict[str, list[tuple[str, int, str]]] = {"train": [], "val": [], "test": []}
    for split, count in (("train", 3), ("test", 3)):
        for label, (name, colour) in enumerate(CLASSES.items()):
            for number in range(count):
                noise = np.random.default_rng([label, number, split == "train"]).integers(0, 90, (18, 16, 3))
                path = folder / f"{split}-{label}-{number}.png"
                Image.fromarray((noise + np.array(colour)).astype(np.uint8)).save(path)
                parts[split].append((path.name, label, name))
    (folder.parent / "split_zhou_toys.json").write_text(json.dumps(parts))


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
        assert curve.hashes.keys() == kept["hashes"].keys(), f"{name} has other tensors"
        if within is not None and within.steps is not None:
            if name.rpartition("/")[2].startswith("01-"):
                found, expected = (
                    {number: values[: within.steps] for number, values in numbers.items()}
                    for numbers in (curve.numbers, kept["numbers"])
                )
                assert_same_numbers(found, expected, name, within)
            return
        assert_same_numbers(curve.numbers, kept["numbers"], name, within)
        beginning = f"{name}/"
        values = {n.removeprefix(beginning): v for n, v in self.values.items() if n.startswith(beginning)}
        assert_same_values(curve.values, values, name, within)
        if within is None:
            assert curve.hashes == kept["hashes"], f"{name}: tensors that are not kept whole have changed"
