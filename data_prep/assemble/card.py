"""The card of an assembled model: README.md for people, assembled.json for programs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.assemble.parts import Part
from data_prep.assemble.recipe import AssembleRecipe, PartConfig
from pipeline.files.atomic import write_json

FACTS = "assembled.json"


def write_card(folder: Path, recipe: AssembleRecipe, parts: Mapping[str, Part]) -> None:
    """Write what the model is made of, with hashes and licences."""
    facts = {name: _facts(getattr(recipe, name), part) for name, part in parts.items()}
    write_json(folder / FACTS, {"name": recipe.name, "parts": facts})
    lines = [
        f"# {recipe.name}",
        "",
        "Assembled by `python -m data_prep.assemble`. Licences of the parts hold for what they became here.",
        "",
        "| part | from | file | licence | SHA-256 |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {fact['from']} | {fact['file'] or 'checkpoint'} | {fact['licence']} | `{fact['sha256']}` |"
            for name, fact in facts.items()
        ),
        "",
        *([recipe.note.strip(), ""] if recipe.note.strip() else []),
    ]
    (folder / "README.md").write_text("\n".join(lines), "utf-8")


def _facts(config: PartConfig, part: Part) -> dict[str, Any]:
    # A local folder's absolute path would differ between two machines.
    place = config.place if config.folder is None else part.folder.name
    return {
        "from": place,
        "commit": part.commit,
        "file": part.file,
        "sha256": part.hash,
        "licence": config.licence,
    }
