"""Two ranks open a run's data, each in a folder of its own, and write what they hashed and what was refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pipeline.config.recipe import Recipe
from pipeline.data import checksums
from pipeline.errors import UserError
from pipeline.ranks.launch import end_as_rank
from pipeline.ranks.world import close_world, init_world
from pipeline.sequence.data import open_data


def main(recipe: Path, folder: Path, name: str) -> None:
    """Rank 0 reads the recipe's prepared data, rank 1 the copy `name` in `folder`."""
    world = init_world()
    loaded = Recipe.model_validate(json.loads(recipe.read_text("utf-8")))
    if not world.main:
        loaded = loaded.model_copy(update={"data": loaded.data.model_copy(update={"prepared": str(folder / name)})})
    hashed: list[str] = []
    whole = checksums.sha256

    def counted(path: Path) -> str:
        hashed.append(path.name)
        return whole(path)

    checksums.sha256 = counted
    said = ""
    try:
        open_data(loaded, world, scoring=True)
    except UserError as error:
        said = str(error)
    (folder / f"{name}-{world.rank}.json").write_text(json.dumps({"said": said, "hashed": hashed}))
    close_world()


if __name__ == "__main__":
    end_as_rank(lambda: main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
