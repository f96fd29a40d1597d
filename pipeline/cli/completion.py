"""Shell completion of recipes, runs, fields and tasks; reads names only, so that it is fast."""

from __future__ import annotations

import json
from glob import escape, glob
from pathlib import Path
from typing import Any

from pipeline.config import registry
from pipeline.config.yaml_file import CONFIG, STATE, find_recipe, read_recipe, recipe_names
from pipeline.errors import UserError
from pipeline.files.paths import RUNS

COIN = "data/own"  # default --root of `new-task` and `add`


def recipes(incomplete: str) -> list[str]:
    """Names of shipped recipes; where none matches the shell completes files."""
    return [name for name in recipe_names() if name.startswith(incomplete)]


def runs(incomplete: str) -> list[str]:
    """Folders of runs, those of `runs` until another folder is named."""
    begun = incomplete if "/" in incomplete else f"{RUNS}/"
    found = sorted(str(Path(path).parent) for path in glob(f"{escape(begun)}*/{CONFIG}"))
    return [folder for folder in found if folder.startswith(incomplete)]


def fields(ctx: Any, incomplete: str) -> list[str]:
    """Fields of the recipe for --set, each with its `=`; after the `=` the choices of a field that has some."""
    # While the option's value is incomplete click has not parsed the arguments, which are in `args`.
    name = str(ctx.params.get("recipe") or next((word for word in ctx.args if not word.startswith("-")), ""))
    try:
        content = read_recipe(find_recipe(name)) if name else {}
    except UserError:
        content = {}
    from pipeline.cli.recipe_fields import dotted_fields  # deferred: importing the recipes' classes is slow

    known = dotted_fields(content)
    dotted, equals, begun = incomplete.partition("=")
    if equals:
        return [f"{dotted}={choice}" for choice in known.get(dotted, ()) if choice.startswith(begun)]
    return [f"{field}=" for field in known if field.startswith(incomplete)]


def methods(ctx: Any, incomplete: str) -> list[str]:
    """Names of methods, of which several may be given with commas between them."""
    before, comma, begun = incomplete.rpartition(",")
    taken = before.split(",")
    return [
        f"{before}{comma}{name}" for name in registry.names("methods") if name.startswith(begun) and name not in taken
    ]


def own_tasks(ctx: Any, incomplete: str) -> list[str]:
    """Tasks in the folder that --root names."""
    folder = Path(str(ctx.params.get("root") or COIN)) / "instructions"
    return sorted(path.name for path in folder.glob("*/") if path.name.startswith(incomplete))


def sets(ctx: Any, incomplete: str) -> list[str]:
    """Prompt sets of the adapter or run that precedes them on the command line."""
    folder = Path(str(ctx.params.get("adapter") or ctx.params.get("run") or ""))
    for file, key in (("adapter.json", "sets"), (STATE, "stages")):
        try:
            names = json.loads((folder / file).read_text("utf-8"))[key]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        return [str(name) for name in names if str(name).startswith(incomplete)]
    return []
