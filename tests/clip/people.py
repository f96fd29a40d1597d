"""A person who labels images in tests: fills in ask.csv by the names of the images."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CLASSES = ("red square", "green square", "blue square")
COLOURS = {"red square": (200, 40, 40), "green square": (40, 180, 60), "blue square": (40, 60, 200)}


def save_photos(folder: Path, count: int = 24, size: int = 40) -> dict[str, str]:
    """Noisy pictures in one colour each, in two folders as a phone names them; returns the class of each."""
    generator, found = np.random.default_rng(3), {}
    for number in range(count):
        name = CLASSES[number % len(CLASSES)]
        pixels = np.clip(np.array(COLOURS[name]) + generator.normal(0, 25, (size, size + 8, 3)), 0, 255)
        path = folder / ("100APPLE", "Camera")[number % 2] / f"IMG_{number:04d}.{('JPG', 'png')[number % 3 == 0]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
        found[path.relative_to(folder).as_posix()] = name
    return found


def asked(run: Path) -> list[dict[str, str]]:
    """The rows of ask.csv."""
    with (run / "ask.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write(run: Path, rows: list[dict[str, str]], columns: tuple[str, ...] = ("image", "label")) -> None:
    """Write ask.csv as a person's program does."""
    with (run / "ask.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, columns, extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)


def fill_in(run: Path, truth: Mapping[str, str], but: int = 0) -> list[dict[str, str]]:
    """Write the class of every asked image but the last `but` ones into ask.csv; returns its rows."""
    rows = asked(run)
    for row in rows[: len(rows) - but]:
        row["label"] = truth[row["image"]]
    write(run, rows)
    return rows


def recipe_fields(folder: Path, photos: Path, name: str = "photos", **changes: Any) -> dict[str, Any]:
    """The fields of a recipe that asks a person about a folder of photos, on the CLIP in `folder`/model."""
    base: dict[str, Any] = {
        "kind": "clip",
        "name": name,
        "seeds": [1],
        "run_dir": str(folder / "runs" / name),
        "data": {
            "root": str(photos),
            "prepared": str(folder / f"prepared-{name}"),
            "datasets": [{"name": "photos", "layout": "unlabelled", "folder": ".", "classes": list(CLASSES)}],
            "protocol": "active",
            "shots": None,
            "workers": 1,
            "prepare_first": True,
        },
        "model": {"path": str(folder / "model")},
        "active": {"rounds": 3, "labels_per_round": 5, "candidates": 0.5, "oracle": "file"},
        "methods": [{"name": "coop", "options": {"length": 2}, "acquire": "badge", "balance": "pcb"}],
        "train": {"epochs": 2, "global_batch": 4, "lr": 0.01, "augment": "none", "processes": 1, "save_minutes": None},
        "tracking": {"enabled": False},
    }
    for group, value in changes.items():
        base[group] = {**base[group], **value} if isinstance(base.get(group), dict) else value
    return base
