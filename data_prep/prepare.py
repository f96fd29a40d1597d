"""Everything a recipe needs on disk: for each task and split, source -> shards -> keys -> verified."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from data_prep.keys import KnownImages, write_keys
from data_prep.shards import write_shards
from data_prep.sources import coin, generated
from data_prep.verify import verify_split
from pipeline.backbones.clip import KeyEncoder, key_identity

if TYPE_CHECKING:
    from pipeline.config import Recipe

SPLITS = ("train", "test")


def prepare(recipe: Recipe, progress: bool = True) -> dict[str, Any]:
    """Prepare the data of a recipe; what is there and up to date is kept, what was interrupted is continued.

    Returns `{"prepared": folder, "splits": [{task, split, samples, shards, fingerprint, wrote}]}` where `wrote` names
    what was new. Raises UserError for a source, CLIP or folder that is not as expected.
    """
    identity = key_identity(*recipe.keys.source)
    root = Path(recipe.data.root)
    if recipe.data.source == "generated":
        generated.draw(root, recipe.data.seed, _common_limit(recipe))

    @cache
    def encoder() -> KeyEncoder:
        return KeyEncoder(*recipe.keys.source)

    known_images: KnownImages = {}
    splits = []
    with _bars(progress) as bars:
        for task in recipe.data.tasks:
            for split, limit in zip(SPLITS, (task.limit_train, task.limit_test), strict=True):
                splits.append(_prepare_split(recipe, task.name, split, limit, identity, encoder, known_images, bars))
    return {"prepared": recipe.data.prepared, "splits": splits}


def _prepare_split(
    recipe: Recipe,
    task: str,
    split: str,
    limit: int | None,
    identity: dict[str, str],
    encoder: Callable[[], KeyEncoder],
    known_images: KnownImages,
    bars: Progress,
) -> dict[str, Any]:
    data, folder = recipe.data, recipe.data.split_path(task, split)
    bar = bars.add_task(f"{task}/{split}: shards", total=None)
    description, wrote_shards = write_shards(
        lambda start: coin.read_task(data.root, task, split, limit, start, data.workers),
        folder,
        data.shard_samples,
        coin.source_fingerprint(data.root, task, split, limit),
        task,
        split,
        partial(bars.advance, bar),
    )
    wrote = ["shards"] if wrote_shards else []
    bars.reset(bar, description=f"{task}/{split}: keys", total=description["count"])
    advance = partial(bars.advance, bar)
    if write_keys(folder, identity, encoder, recipe.keys.batch, data.workers, advance, known_images):
        wrote.append("keys")
    if wrote:  # reading everything again on every call would make a second `prepare` as slow as the first
        bars.update(bar, description=f"{task}/{split}: verify")
        verify_split(folder, identity)
    bars.update(bar, description=f"{task}/{split}: {'ready' if wrote else 'up to date'}")
    return {
        "task": task,
        "split": split,
        "samples": description["count"],
        "shards": len(description["shards"]),
        "fingerprint": description["fingerprint"],
        "wrote": wrote,
    }


def _common_limit(recipe: Recipe) -> tuple[int, int] | None:
    """Return the largest (train, test) limit when every task has both: more need not be drawn."""
    limits = [(task.limit_train, task.limit_test) for task in recipe.data.tasks]
    train, test = ([limit for limit in part if limit is not None] for part in zip(*limits, strict=True))
    return (max(train), max(test)) if len(train) == len(test) == len(limits) else None


def _bars(enabled: bool) -> Progress:
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(TextColumn("{task.description}"), *columns, disable=not enabled)
