"""What the forms that start commands have in common: their fields, and what is refused before a command starts."""

from __future__ import annotations

from pipeline.ui.runs import Entry
from pipeline.ui.web import PageError

FORETELL, LEARN = "foretell", "learn"
CHOICES = ("gate", "share")
GO_ON = "Go on with"


def learning(fields: dict[str, str]) -> bool:
    """Whether a form asks for learning, not for foretelling; PageError for anything else."""
    learns = fields.get("what") == LEARN
    if not learns and fields.get("what") != FORETELL:
        raise PageError(f"expected {FORETELL} or {LEARN} as what to do.", 400)
    return learns


def refuse_in_use(entry: Entry) -> None:
    """Raise PageError for a run that a process works on."""
    if entry.writer:
        raise PageError(
            f"{entry.name} is in use by {entry.writer}; wait until that has ended, or end it, and try again.", 409
        )


def choices_of(fields: dict[str, str]) -> dict[str, str]:
    """The options of `add` that change the run's method; PageError for one that is no number."""
    found = {name: fields[name] for name in CHOICES if fields.get(name)}
    for name, value in found.items():
        try:
            float(value)
        except ValueError:
            raise PageError(f"{name} is '{value[:20]}'; expected a number, or nothing.", 422) from None
    return found
