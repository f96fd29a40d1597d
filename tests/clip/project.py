"""A tiny benchmark in a folder: a random CLIP, a dataset of noise pictures, and a recipe on both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from typer.testing import CliRunner

from pipeline.cli.commands import app
from pipeline.clip.recipe import ClipRecipe
from pipeline.errors import EXIT_USER
from tests.clip.tiny import byte_tokenizer, clip_model

NAMES = ("red_panda", "golf ball", "tench", "organ", "church", "parachute")
IMAGES = {"train": 6, "val": 0, "test": 4}
SHOTS, SEEDS = 4, (1, 2)


def save_model(folder: Path, **sizes: Any) -> Path:
    """A random CLIP with tokenizer and image processor, as a checkpoint."""
    from transformers import CLIPImageProcessorPil

    clip_model(**sizes).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def save_dataset(root: Path, name: str = "toys", names: tuple[str, ...] = NAMES) -> Path:
    """Noise pictures of a few classes with a split file, in CoOp's layout."""
    parts: dict[str, list[tuple[str, int, str]]] = {}
    for split, count in IMAGES.items():
        for label, title in enumerate(names):
            for number in range(count):
                path = Path(f"{split}-{label}-{number}.png")
                noise = np.random.default_rng([label, number, split == "train"]).integers(0, 256, (20, 24, 3))
                (root / name / "images").mkdir(parents=True, exist_ok=True)
                Image.fromarray(noise.astype(np.uint8)).save(root / name / "images" / path)
                parts.setdefault(split, []).append((path.name, label, title))
    split_file(root, name).write_text(json.dumps({"val": [], **parts}))
    return root / name


def split_file(root: Path, name: str = "toys") -> Path:
    """The split file of a saved dataset."""
    return root / name / f"split_zhou_{name}.json"


def fields(folder: Path, *methods: Any, name: str = "tiny", train: Any = None, data: Any = None, **changes: Any) -> Any:
    """The fields of a recipe in a folder that `save_model` and `save_dataset` filled."""
    toys = {"name": "toys", "layout": "split_zhou", "images": "images", "split": "split_zhou_toys.json"}
    base = {
        "kind": "clip",
        "name": name,
        "seeds": list(SEEDS),
        "run_dir": str(folder / "runs" / name),
        "data": {
            "root": str(folder / "data"),
            "prepared": str(folder / "prepared"),
            "datasets": [toys],
            "shots": SHOTS,
            "workers": 1,
            "prepare_first": True,
            **(data or {}),
        },
        "model": {"path": str(folder / "model")},
        "methods": list(methods),
        "train": {"epochs": 2, "global_batch": 4, "lr": 0.01, "log_every": 1, "processes": 1, **(train or {})},
        "tracking": {"enabled": False},
    }
    return {**base, **changes}


def recipe(folder: Path, *methods: Any, **changes: Any) -> ClipRecipe:
    """The same as a recipe."""
    return ClipRecipe.model_validate(fields(folder, *methods, **changes))


def recipe_file(folder: Path, *methods: Any, **changes: Any) -> Path:
    """The same as a file."""
    content = fields(folder, *methods, **changes)
    path = folder / f"{content['name']}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def make_project(folder: Path) -> Path:
    """Model and data in a folder."""
    save_model(folder / "model")
    save_dataset(folder / "data")
    return folder


def said(*arguments: str) -> str:
    """The one sentence with which the command line refuses something, with exit code 2."""
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == EXIT_USER, done.output
    assert "Traceback" not in done.output
    return done.stderr
