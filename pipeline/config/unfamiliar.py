"""What becomes of questions that resemble no task."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

Unfamiliar: TypeAlias = Literal["answer", "zero_shot", "flag"]
UNFAMILIAR: tuple[Unfamiliar, ...] = get_args(Unfamiliar)
