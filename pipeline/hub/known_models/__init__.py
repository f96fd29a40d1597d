"""Numbers of the models that the shipped recipes name, so that `check` can plan before a model is fetched.

Each file is named by the id of a repository and holds

* `source`: the repository, the day on which its numbers were read, where they were seen, and what was not seen,
* `config`: those fields of its config.json that a memory plan depends on,
* `processor`: those settings of its processor that the number of tokens of an image depends on.

They are for planning alone: nothing is loaded by them, and where a model is on this machine its own files are read.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def known_names() -> list[str]:
    """The repositories with shipped numbers."""
    return sorted(file.stem.replace("--", "/") for file in Path(__file__).parent.glob("*.json"))


def known_settings(path: str) -> dict[str, Any] | None:
    """Return the shipped part of a repository's config.json; None for a repository without one."""
    content = _content(path)
    return None if content is None else content["config"]


def known_config(path: str) -> Any:
    """`known_settings` as a configuration of transformers; raises OSError for a repository without one."""
    from transformers import AutoConfig

    settings = known_settings(path)
    if settings is None:
        raise OSError(f"the sizes of '{path}' are not known here")
    return AutoConfig.for_model(**settings)


def known_processor(path: str) -> Any:
    """A stand-in for a repository's processor, for `ImageSizes`: it has no tokenizer; None for a repository without.

    Its image processor is the one of transformers that the checkpoint names, with the shipped settings.
    """
    import transformers

    settings = (_content(path) or {}).get("processor")
    if settings is None:
        return None
    images = dict(settings["image_processor"])
    made = getattr(transformers, images.pop("class"))(**images)
    others = {name: value for name, value in settings.items() if name != "image_processor"}
    return SimpleNamespace(image_processor=made, tokenizer=SimpleNamespace(), **others)


def known_since(path: str) -> str:
    """The day on which a repository's shipped numbers were read, as in "2026-11-29"; "" for one without."""
    return str((_content(path) or {}).get("source", {}).get("read", ""))


def _content(path: str) -> dict[str, Any] | None:
    file = Path(__file__).parent / f"{path.replace('/', '--')}.json"
    return json.loads(file.read_text("utf-8")) if "/" in path and file.is_file() else None
