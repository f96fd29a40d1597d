"""The error of a refused request, and how it describes the values that were found."""

from __future__ import annotations

from typing import Any

from pipeline.errors import PipelineError

SHOWN = 20  # characters of a value that an error quotes


class RefusedError(PipelineError):
    """A request is refused; `status` is the HTTP status, `code` the machine-readable reason."""

    def __init__(self, message: str, status: int = 400, code: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status, self.code = status, code


def kind_of(value: Any) -> str:
    """The type of a JSON value, in words."""
    names = {dict: "an object", list: "a list", str: "text", type(None): "missing", bool: "true or false"}
    return names.get(type(value), "a number")


def shown(value: Any) -> str:
    """A JSON value for a message, shortened; texts are quoted, so that "10" is distinguishable from a number."""
    if isinstance(value, str):
        return f"the text '{value[:SHOWN]}'"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return str(value)[:SHOWN]
    return "null" if value is None else kind_of(value)
