"""Everything a recipe needs on disk: for each task and split, source -> shards -> keys -> verified."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from data_prep.bad_records import Tolerance
from data_prep.keys import KnownImages, write_keys
from data_prep.shards import discard, write_shards
from data_prep.sources import generated
from data_prep.sources.coin import coin_split
from data_prep.verify import is_verified, mark_verified, unmark, verify_split
from pipeline.backbones.clip import KeyEncoder, key_identity
from pipeline.errors import UserError
from pipeline.metrics.scoring import require_metrics

if TYPE_CHECKING:
    from pipeline.config import Recipe, TaskConfig

SPLITS = ("train", "test")


def prepare(recipe: Recipe, progress: bool = True) -> dict[str, Any]:
    """Prepare the data of a recipe; what is there and up to date is kept, what was interrupted is continued.

    Returns `{"prepared": folder, "splits": [{task, split, samples, shards, fingerprint, wrote}], "skipped": [...]}`
    where `wrote` names what was new and `skipped` the bad records that `data.skip_bad` let be left out, one sentence
    each. Raises UserError for a source, CLIP or folder that is not as expected.
    """
    require_metrics([task.metric for task in recipe.data.tasks])
    identity = key_identity(*recipe.keys.source)
    root = Path(recipe.data.root)
    if recipe.data.source == "generated":
        generated.draw(root, recipe.data.seed, _common_limit(recipe))

    @cache
    def encoder() -> KeyEncoder:
        return KeyEncoder(*recipe.keys.source)

    known_images: KnownImages = {}
    tolerance = Tolerance(recipe.data.skip_bad)
    splits = []
    with progress_bars(progress) as bars:
        for task in recipe.data.tasks:
            for split in SPLITS:
                known = len(tolerance.skipped)
                splits.append(_prepare_split(recipe, task, split, identity, encoder, known_images, tolerance, bars))
                for record in tolerance.skipped[known:] if progress else ():
                    bars.console.print(f"left out: {record.sentence()}", style="yellow", markup=False, soft_wrap=True)
    skipped = [record.sentence() for record in tolerance.skipped]
    return {"prepared": recipe.data.prepared, "splits": splits, "skipped": skipped}


def _prepare_split(
    recipe: Recipe,
    task: TaskConfig,
    split: str,
    identity: dict[str, str],
    encoder: Callable[[], KeyEncoder],
    known_images: KnownImages,
    tolerance: Tolerance,
    bars: Progress,
) -> dict[str, Any]:
    data, folder, name = recipe.data, recipe.data.split_path(task.name, split), f"{task.name}/{split}"
    source = coin_split(data, task, split)
    bar = bars.add_task(f"{name}: shards", total=None)
    description, wrote_shards = write_shards(
        lambda start: source.records(start, data.workers),
        folder,
        data.shard_samples,
        source.fingerprint(),
        task.name,
        split,
        partial(bars.advance, bar),
        tolerance,
    )
    wrote = ["shards"] if wrote_shards else []
    bars.reset(bar, description=f"{name}: keys", total=description["count"])
    advance = partial(bars.advance, bar)
    if write_keys(folder, identity, encoder, recipe.keys.batch, data.workers, advance, known_images):
        wrote.append("keys")
    if wrote or not is_verified(folder, description["fingerprint"], identity):
        bars.update(bar, description=f"{name}: verify")
        _verify(folder, description["fingerprint"], identity)
    bars.update(bar, description=f"{name}: {'ready' if wrote else 'up to date'}")
    return {
        "task": task.name,
        "split": split,
        "samples": description["count"],
        "shards": len(description["shards"]),
        "fingerprint": description["fingerprint"],
        "wrote": wrote,
    }


def _verify(folder: Path, fingerprint: str, identity: dict[str, str]) -> None:
    unmark(folder)
    try:
        verify_split(folder, identity)
    except UserError:
        discard(folder)  # the next call writes it anew, as the error says
        raise
    mark_verified(folder, fingerprint, identity)


def _common_limit(recipe: Recipe) -> tuple[int, int] | None:
    """Return the largest (train, test) limit when every task has both: more need not be drawn."""
    limits = [(task.limit_train, task.limit_test) for task in recipe.data.tasks]
    train, test = ([limit for limit in part if limit is not None] for part in zip(*limits, strict=True))
    return (max(train), max(test)) if len(train) == len(test) == len(limits) else None


def progress_bars(enabled: bool) -> Progress:
    """The bars of a preparation on the terminal."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(TextColumn("{task.description}"), *columns, disable=not enabled)
