"""Descriptions of classes: several texts for a class, whose features or logits are averaged (docs/design.md 5.15)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.clip.recipe_descriptions import DescriptionsConfig, Mode
from pipeline.clip.towers.text import readable
from pipeline.errors import UserError, nearest
from pipeline.files.strict_text import load_json

TEXT = "{}, which is/has {}"  # as published; the class name is in lower case


@dataclass(frozen=True)
class Descriptions:
    """The descriptions of classes, by their plain names (see `_plain`), and what is averaged over them."""

    mode: Mode
    texts: Mapping[str, tuple[str, ...]]
    source: str  # where they are from, for errors

    @classmethod
    def read(cls, config: DescriptionsConfig, dataset: str) -> Descriptions:
        """The descriptions of a dataset's file.

        UserError for a missing file, another content than lists of texts by class name, an empty list or text, and two
        names that are one in lower case.
        """
        path = config.path(dataset)
        try:
            found = load_json(path.read_text("utf-8-sig"))
        except OSError as error:
            raise UserError(
                f"The descriptions {path} cannot be read ({error.strerror or error}). Put the file there, or correct "
                "descriptions.file."
            ) from None
        except UserError as error:
            raise UserError(f"{path}: {error}.") from None
        except ValueError as error:
            raise UserError(f"{path} is not JSON ({error}); expected lists of texts by class name.") from None
        return cls.of_lists(config.mode, found, str(path))

    @classmethod
    def of_lists(cls, mode: Mode, found: Any, source: str) -> Descriptions:
        """The descriptions in an object of lists; UserError as `read`."""
        if not isinstance(found, dict):
            raise UserError(f"{source} holds no object; expected lists of texts by class name.")
        texts: dict[str, tuple[str, ...]] = {}
        for name, listed in found.items():
            if not isinstance(listed, list) or not all(isinstance(text, str) and text.strip() for text in listed):
                raise UserError(f"{source} has no list of texts for '{name}'; expected its descriptions, none empty.")
            if not listed:
                raise UserError(f"{source} has an empty list for '{name}'; expected one description or more.")
            if _plain(name) in texts:
                raise UserError(f"{source} has '{name}' twice in other capitals; merge the two lists.")
            texts[_plain(name)] = tuple(listed)
        return cls(mode, texts, source)

    def of(self, names: Sequence[str]) -> list[tuple[str, ...]]:
        """The descriptions of each class; UserError for a class without any."""
        lacking = [name for name in names if _plain(name) not in self.texts]
        if lacking:
            raise UserError(
                f"{self.source} describes no class '{readable(lacking[0])}' ({len(lacking)} such classes). Add it."
                + nearest(_plain(lacking[0]), self.texts)
            )
        return [self.texts[_plain(name)] for name in names]

    def described(self, names: Sequence[str]) -> list[str]:
        """A text for each description, class after class, in place of the class names."""
        pairs = zip(names, self.of(names), strict=True)
        return [TEXT.format(readable(name).lower(), text) for name, texts in pairs for text in texts]

    def averaging(self, names: Sequence[str]) -> Tensor:
        """The matrix [K, R] that averages values of the R texts of `described` by class."""
        counts = [len(texts) for texts in self.of(names)]
        rows = torch.repeat_interleave(torch.arange(len(names)), torch.tensor(counts))
        matrix = torch.zeros(len(names), len(rows))
        matrix[rows, torch.arange(len(rows))] = 1.0 / torch.tensor(counts, dtype=torch.float32)[rows]
        return matrix

    def to_json(self, names: Sequence[str]) -> dict[str, Any]:
        """The object of meta.json, from which `from_json` makes the descriptions of these classes."""
        return {"mode": self.mode, "texts": dict(zip(names, map(list, self.of(names)), strict=True))}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Descriptions:
        """The descriptions that `to_json` wrote."""
        return cls.of_lists(found["mode"], found["texts"], "The unit's meta.json")

    def identity(self) -> str:
        """A hash of mode and texts."""
        return hashlib.sha256(json.dumps([self.mode, sorted(self.texts.items())]).encode()).hexdigest()


def _plain(name: str) -> str:
    """A class name without regard to case, underscores and repeated blanks."""
    return " ".join(readable(name).lower().split())
