"""Dotted names of a recipe's fields and their choices, for completion."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from pipeline.config import registry
from pipeline.config.messages import model_in, variants_of
from pipeline.config.method import DEFAULT, FromRegistry
from pipeline.config.recipe import Recipe


def dotted_fields(content: dict[str, Any]) -> dict[str, list[str]]:
    """Return every field of the recipe with this content, with the choices of enumerated fields.

    Items of a list are addressed by name, as in `--set data.tasks.Count.limit_test=5`.
    """
    if content.get("kind") == "clip":
        from pipeline.clip.recipe import ClipRecipe  # deferred: imports torch, which task sequences do not need here

        return dict(_fields(ClipRecipe, content, ""))
    return dict(_fields(Recipe, content, ""))


def _fields(model: type[BaseModel], content: Any, place: str) -> Iterator[tuple[str, list[str]]]:
    content = content if isinstance(content, dict) else {}
    for name, info in model.model_fields.items():
        inner, path, value = model_in(info.annotation), place + name, content.get(name)
        registered = next((mark for mark in info.metadata if isinstance(mark, FromRegistry)), None)
        if registered is not None:
            yield path, registry.names(registered.kind)
        elif inner is None:
            yield path, _choices(info.annotation)
        elif isinstance(value, list):
            names = [str(item["name"]) for item in value if isinstance(item, dict) and "name" in item]
            yield path, names
            for item in names:
                yield from _fields(inner, {}, f"{path}.{item}.")
        else:
            named = value.get("name", DEFAULT) if isinstance(value, dict) else DEFAULT
            yield from _fields(variants_of(inner).get(named, inner), value, f"{path}.")


def _choices(annotation: Any) -> list[str]:
    """The choices of an enumerated field; empty for numbers and text."""
    if annotation is bool:
        return ["true", "false"]
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    return [choice for part in get_args(annotation) for choice in _choices(part)]
