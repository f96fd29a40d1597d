"""A working folder outside of the repository: tiny models, tasks in the example's data format, installed packages."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import registry
from tests import tiny_clip
from tests.extending.site_folder import install
from tests.extending.vip_llava_checkpoint import save_vip_llava

TASKS = ("Colours", "Shapes")
ANSWERS = ("red one", "blue one", "red two")


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all example packages are installed."""
    return install(tmp_path_factory.mktemp("site"))


@pytest.fixture
def installed(site: Path) -> Iterator[Path]:
    """The example packages, as this process finds them."""
    names = [path.stem for path in site.glob("*.py")]
    for name in names:
        sys.modules.pop(name, None)  # another test's module of the same name
    sys.path.insert(0, str(site))
    registry._entry_points.cache_clear()
    yield site
    sys.path.remove(str(site))
    registry._entry_points.cache_clear()
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models, two tasks as JSON lines, and a recipe in which every example of a sequence has a part."""
    folder = tmp_path_factory.mktemp("elsewhere")
    save_vip_llava(folder / "vip-llava")
    tiny_clip.save_clip(folder / "clip")
    for number, task in enumerate(TASKS):
        save_jsonl(folder / "tables", task, number)
    (folder / "mine.yaml").write_text(json.dumps(fields()))
    return folder


def save_jsonl(root: Path, task: str, number: int) -> None:
    """A task of `jsonl_folder` with ten training and four test questions; one in four has no image."""
    (root / task / "images").mkdir(parents=True)
    for split, count in (("train", 10), ("test", 4)):
        rows = []
        for index in range(count):
            row: dict[str, Any] = {"id": index, "question": f"what is {index % 3}?", "answer": ANSWERS[index % 3]}
            if index % 4 != 3:
                row["image"] = f"{split}-{index}.png"
                picture = tiny_clip.picture(100 * number + index + 50 * (split == "test"), kind="PNG")
                (root / task / "images" / row["image"]).write_bytes(picture)
            rows.append(json.dumps(row))
        (root / task / f"{split}.jsonl").write_text("\n".join(rows) + "\n")


def fields() -> dict[str, Any]:
    """The recipe's fields."""
    return {
        "name": "mine",
        "run_dir": "runs/{method}",
        "data": {
            "source": "jsonl_folder",
            "root": "tables",
            "validation_share": 0.0,
            "tasks": [
                {"name": "Colours", "metric": "first_word", "max_new_tokens": 3},
                {"name": "Shapes", "metric": "balanced", "max_new_tokens": 3},
            ],
        },
        "model": {"path": "vip-llava", "max_length": 256},
        "keys": {"path": "clip"},
        "method": {"name": "modalprompt", "prompt_length": 4, "selection": "nearest_two"},
        "train": {
            "steps": 2,
            "global_batch": 4,
            "lr_prompt": 0.05,
            "lr_head": 0.01,
            "log_every": 1,
            "deepspeed": "ds_configs/zero0.json",
        },
        "tracking": {"enabled": False},
    }
