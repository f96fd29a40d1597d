"""Types of a recipe's paths: `~` and `$VARIABLES` in them are expanded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from pydantic import BeforeValidator

from pipeline.errors import UserError
from pipeline.files.paths import expanded, expanded_uri


def _for_pydantic(replace: Callable[[str], str]) -> Callable[[object], object]:
    """`replace` as a pydantic validator: it raises ValueError and leaves values other than text to the field's type."""

    def validated(value: object) -> object:
        try:
            return replace(value) if isinstance(value, str) else value
        except UserError as error:
            raise ValueError(f"expected a path that exists or can be made: {error}") from None

    return validated


GivenPath = Annotated[str, BeforeValidator(_for_pydantic(expanded))]
GivenUri = Annotated[str, BeforeValidator(_for_pydantic(expanded_uri))]
