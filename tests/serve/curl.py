"""The request about a picture that docs/serving.md shows, by curl as it stands there."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

from pipeline.adapter.answering import Question
from pipeline.config.paths import PROJECT

ADDRESS, MODEL = "http://127.0.0.1:8000", "nano-modalprompt-s0"  # as the page has them


def shown(part: str) -> str:
    """The block of commands with these words."""
    page = (PROJECT / "docs" / "serving.md").read_text("utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    (found,) = (block for kind, block in blocks if not kind and part in block)
    return str(found)


def question(picture: bytes) -> Question:
    """What the page asks about scene.png."""
    found = re.search(r'"text": "([^"]+)"', shown("scene.png | tr"))
    assert found is not None
    return Question(found[1], picture)


def run(commands: str, url: str, model: str = "", picture: bytes = b"", folder: Path | None = None) -> Any:
    """The JSON that commands of the page get from a service at an address, with a picture as scene.png in a folder."""
    assert ADDRESS in commands
    if folder is not None:
        (folder / "scene.png").write_bytes(picture)
    commands = commands.replace(ADDRESS, url).replace(MODEL, model)
    done = subprocess.run(["sh", "-eu", "-c", commands], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
