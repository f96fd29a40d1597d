"""An answer, and how its question came to its sets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Chosen:
    """The sets that a question got, in the order of insertion, and what the router says of the tasks.

    `similarity` is the router's score for the task of every set, whose scale depends on the router; empty without one.
    `probability` is the calibrated probability of each task, and `unfamiliar` whether the question differs more from
    the most similar task's training samples than nearly all of these do; both are None where the sets keep no keys to
    tell.
    """

    selected: list[str] = field(default_factory=list)
    similarity: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] | None = None  # of the inserted sets; None: each has weight 1
    probability: dict[str, float] | None = None
    unfamiliar: bool | None = None

    @property
    def sets(self) -> str:
        """The inserted sets in words, the most similar one first: `Count 98 %, Boxes 1 %`, or `Count 0.70`."""
        return ", ".join(self.scored(name) for name in reversed(self.selected)) or "none"

    def scored(self, name: str) -> str:
        """A set's name with the probability of its task in percent, else the similarity to it, where there is one."""
        if self.probability is not None and name in self.probability:
            return f"{name} {100 * self.probability[name]:.0f} %"
        return f"{name} {self.similarity[name]:.2f}" if name in self.similarity else name

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object, without those that are not known."""
        optional = {"weights": self.weights, "probability": self.probability, "unfamiliar": self.unfamiliar}
        known = {name: value for name, value in optional.items() if value is not None}
        return {"selected": self.selected, "similarity": self.similarity, **known}


@dataclass(frozen=True)
class Answer(Chosen):
    """An answer's text, and how its question came to its sets."""

    text: str = ""
