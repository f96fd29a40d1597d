"""Turns pydantic's errors about a recipe into sentences: the dotted field, what was found, what was expected."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pipeline.config.base import NAME_LETTERS
from pipeline.errors import nearest

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
    """Return the errors of a recipe of the class `root` as sentences, at most the first `most` of them."""
    told = [details for details in error.errors() if not _long_enough(details)]
    unquoted = [details for details in told if _is_unquoted(details, root)]
    sentences = [_one(details, root) for details in told if details not in unquoted]
    return " ".join([*([_quote(unquoted)] if unquoted else []), *sentences][:most])


def _long_enough(details: ErrorDetails) -> bool:
    """Whether a list that pydantic reports as too short is long enough: pydantic counts only its valid entries."""
    least = details.get("ctx", {}).get("min_length")
    found = details["input"]
    return (
        details["type"] == "too_short" and isinstance(found, list | tuple) and least is not None and len(found) >= least
    )


def _is_unquoted(details: ErrorDetails, root: type[BaseModel]) -> bool:
    """Whether YAML read an unquoted name as a number, a date or a boolean."""
    if not isinstance(details["input"], bool | int | float | datetime.date):
        return False
    location = details["loc"]
    if details["type"] == "string_type":
        return True
    named = "name" in _model_at(location, root).model_fields
    return details["type"].startswith(("model_", "dict_")) and isinstance(location[-1], int) and named


def _quote(unquoted: list[ErrorDetails]) -> str:
    fields = ", ".join(".".join(map(str, details["loc"])) for details in unquoted)
    values = ", ".join(json.dumps(details["input"], default=str) for details in unquoted)
    return (
        f"{fields}: found {values}, expected text; YAML takes numbers, dates, yes, no, on and off without quotes for "
        'values, so quote it, as in "Yes" or "2024".'
    )


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
    if not hint:  # perhaps a field of another group, such as lr_prompt without `train.`
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


def variants_of(model: type[BaseModel]) -> Mapping[str, type[BaseModel]]:
    """The classes that a group may have, by its field `name`, such as the options of each method; mostly empty."""
    variants: Mapping[str, type[BaseModel]] = getattr(model, "variants", dict)()
    return variants


def _paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in model.model_fields.items():
        yield prefix + name
        inner = model_in(info.annotation)
        if inner is not None:
            for one in (inner, *variants_of(inner).values()):
                yield from _paths(one, f"{prefix}{name}.")
