"""Several jobs share what one of them could have to itself: a folder of prepared data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tests.faults.bench import STEPS, TASKS, Bench, Row


def one_prepared_folder(bench: Bench) -> Iterator[Row]:
    """Two processes prepare one folder at the same time; then two runs keep vision features in it."""
    shared = str(bench.folder / "shared-data")
    recipes = [
        bench.recipe(f"shared-{number}", data__prepared=shared, train__vision_features="kept") for number in (1, 2)
    ]
    both = [bench.start(["prepare", str(recipe)]) for recipe in recipes]
    codes = [process.wait() for process in both]
    temporary = _temporaries(Path(shared))
    said = next((process.said() for process in both if process.said()), "")
    yield Row(
        "two processes prepare one folder",
        "one works, the other waits and takes what is there",
        "nothing",
        str(codes),
        codes == [0, 0] and not temporary,
        said or ", ".join(temporary),
    )
    both = [bench.start(["run", str(recipe)]) for recipe in recipes]
    codes = [process.wait() for process in both]
    alone = bench.recipe("shared-alone", data__prepared=shared, train__vision_features="kept")
    codes.append(bench.run(alone)[0])
    names = ("shared-1", "shared-2", "shared-alone")
    sets = [_sets(bench.folder / "runs" / name) for name in names]
    kept = list(Path(shared).glob("*/train/vision-*/features-*.safetensors"))
    passed = codes == [0, 0, 0] and len(sets[0]) == TASKS and sets[0] == sets[1] == sets[2] and bool(kept)
    said = next((process.said() for process in both if process.said()), "")
    yield Row(
        "two runs on one prepared folder",
        f"both keep features there and learn the same in {STEPS} steps",
        "nothing",
        str(codes),
        passed and not _temporaries(Path(shared)),
        said,
    )


def _sets(run: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(run.glob("stages/*/prompts.safetensors"))]


def _temporaries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.tmp"))
