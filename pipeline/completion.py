"""What a shell may complete on the command line; looks at names only, so that it is quick."""

from __future__ import annotations

from glob import escape, glob
from pathlib import Path

from pipeline.recipe_file import recipe_names

RUNS = "runs/"  # where runs are unless a recipe says otherwise


def recipes(incomplete: str) -> list[str]:
    """Names of shipped recipes; where there is none the shell goes on with files."""
    return [name for name in recipe_names() if name.startswith(incomplete)]


def runs(incomplete: str) -> list[str]:
    """Folders of runs, those of `runs` until another folder is named."""
    begun = incomplete if "/" in incomplete else RUNS
    found = sorted(str(Path(path).parent) for path in glob(f"{escape(begun)}*/config.yaml"))
    return [folder for folder in found if folder.startswith(incomplete)]
