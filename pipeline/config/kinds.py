"""The kinds of recipes and runs, read from their files without pydantic, so that the command line starts quickly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.config.yaml_file import CONFIG, find_recipe, read_recipe
from pipeline.errors import UserError


def recipe_kind(name_or_path: str | Path) -> str | None:
    """Return the field `kind` of a recipe file: clip for a benchmark of prompt methods, None for a task sequence."""
    kind = read_recipe(find_recipe(str(name_or_path))).get("kind")
    if kind not in (None, "clip"):
        raise UserError(f"recipe '{name_or_path}': kind is {kind!r}, expected clip, or none for a task sequence.")
    return kind


def run_kind(run_path: Path) -> str | None:
    """Return the kind of a run's recipe; None also where there is no run, which whatever reads the run reports."""
    path = run_path / CONFIG
    return recipe_kind(path) if path.is_file() else None


def one_kind(runs: Sequence[Path]) -> str | None:
    """Return the kind that all runs have, as `run_kind` does; UserError when their kinds differ."""
    kinds = {path: run_kind(path) for path in runs if (path / CONFIG).is_file()}
    if len(set(kinds.values())) > 1:
        words = {"clip": "a benchmark of prompt methods on CLIP", None: "a task sequence"}
        listed = ", ".join(f"'{path}' is {words[kind]}" for path, kind in kinds.items())
        raise UserError(
            f"these runs are of different kinds, whose scores cannot stand in one table: {listed}; report "
            "those of one kind together."
        )
    return run_kind(runs[0])
