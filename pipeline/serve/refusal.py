"""Requests that are not answered: the error with its status, and how what was found is named in its sentence."""

from __future__ import annotations

from typing import Any

from pipeline.errors import PipelineError

SHOWN = 20  # characters of what was found


class RefusedError(PipelineError):
    """A request is not answered; `status` is the HTTP status, `code` a word for programs."""

    def __init__(self, message: str, status: int = 400, code: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status, self.code = status, code


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "text", type(None): "missing", bool: "true or false"}
    return names.get(type(value), "a number")


def shown(value: Any) -> str:
    """A JSON value in a sentence: texts in quotes, so that "10" is seen to be none of the numbers; never the whole."""
    if isinstance(value, str):
        return f"the text '{value[:SHOWN]}'"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return str(value)[:SHOWN]
    return "null" if value is None else kind_of(value)
