"""Turning pydantic's findings about a recipe into sentences: the dotted field, what was found, what was expected."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pipeline.errors import nearest
from pipeline.recipe_base import NAME_LETTERS

EXPECTED = {
    "float": "a number",
    "dict": "a group of fields",
    "int": "a whole number",
    "bool": "true or false",
    "string": "text",
    "tuple": "a list",
    "list": "a list",
    "model": "a group of fields",
    "finite": "a finite number",
    "too_short": "more entries",
    "too_long": "fewer entries",
}


def sentence(error: ValidationError, root: type[BaseModel], most: int | None = None) -> str:
    """Return one sentence for all that is wrong with a recipe of the class `root`, or for the first `most` things."""
    return " ".join(_one(details, root) for details in error.errors()[:most])


def _one(details: ErrorDetails, root: type[BaseModel]) -> str:
    location = details["loc"]
    field = ".".join(map(str, location)) or "the recipe"
    kind = details["type"]
    found = details["input"]
    context: dict[str, Any] = details.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_field(field, location, root)
    if kind == "missing":
        return f"{field} is missing; add it{_described(location, root)}."
    if kind == "literal_error":
        valid = re.findall(r"'([^']*)'", context["expected"])
        return f"{field}: found {found!r}, expected one of {', '.join(valid)}.{nearest(str(found), valid)}"
    if kind == "value_error":
        reason = str(context["error"]).rstrip(".")
        stop = "" if reason.endswith("?") else "."
        return f"{field}: {'' if isinstance(found, dict | list | tuple) else f'found {found!r}, '}{reason}{stop}"
    if kind == "string_pattern_mismatch":
        return f"{field}: found {found!r}, expected {NAME_LETTERS}."
    if kind.startswith(("greater_than", "less_than")):
        wanted = details["msg"].removeprefix("Input should be ")
        return f"{field}: found {found!r}, expected a number {wanted}."
    expected = next((words for start, words in EXPECTED.items() if kind.startswith(start)), None)
    return f"{field}: found {found!r}, expected {expected or details['msg']}."


def _unknown_field(field: str, location: tuple[int | str, ...], root: type[BaseModel]) -> str:
    *parents, name = map(str, location)
    siblings = list(_model_at(location[:-1], root).model_fields)
    hint = nearest(name, siblings)
    if not hint:  # a known name in the wrong place, such as lr_prompt without its train.
        elsewhere = [path for path in _paths(root) if path.rsplit(".", 1)[-1] == name]
        hint = f" Did you mean '{elsewhere[0]}'?" if elsewhere else ""
    where = ".".join(parents) or "the recipe"
    return f"unknown field '{field}'; {where} has {', '.join(siblings)}.{hint}"


def _described(location: tuple[int | str, ...], root: type[BaseModel]) -> str:
    info = _model_at(location[:-1], root).model_fields.get(str(location[-1]))
    return f" ({info.description})" if info is not None and info.description else ""


def _model_at(location: tuple[int | str, ...], root: type[BaseModel]) -> type[BaseModel]:
    model = root
    for part in location:
        if isinstance(part, str) and part in model.model_fields:
            model = model_in(model.model_fields[part].annotation) or model
    return model


def model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for inner in get_args(annotation) if (model := model_in(inner)) is not None), None)


def _paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in model.model_fields.items():
        yield prefix + name
        inner = model_in(info.annotation)
        if inner is not None:
            yield from _paths(inner, f"{prefix}{name}.")
