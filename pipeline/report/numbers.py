"""Numbers as the report, the terminal and MLflow's description write them; a dash stands for an unknown one."""

from __future__ import annotations

from pipeline.metrics.intervals import Interval

NONE, MINUS, TO = "–", "−", "–"
THIN = "\N{NARROW NO-BREAK SPACE}"  # between groups of three digits


def fixed(value: float, digits: int) -> str:
    """A number with so many digits after the point, a minus sign, and no sign before a zero."""
    text = f"{value:,.{digits}f}".replace(",", THIN)
    return text.lstrip("-") if not text.strip(f"-0.{THIN}") else text.replace("-", MINUS)


def percent(score: float | None) -> str:
    """A score in percent."""
    return NONE if score is None else fixed(score, 1)


def spread(value: tuple[float, float] | None) -> str:
    """A mean and its deviation."""
    return NONE if value is None else f"{fixed(value[0], 1)} ± {fixed(value[1], 1)}"


def amount(value: float | None, digits: int = 0) -> str:
    """A number of things, of seconds or of bytes."""
    return NONE if value is None else fixed(value, digits)


def limits(found: Interval | None) -> str:
    """An interval in percent."""
    return NONE if found is None else f"{fixed(found[0], 1)}{TO}{fixed(found[1], 1)}"
