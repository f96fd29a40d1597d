"""Prepares the data of a recipe: for each task and split, from the source to shards, CLIP keys and verification."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from data_prep.bad_records import BadRecord, Tolerance
from data_prep.key_processes import keys_by_processes
from data_prep.keys import KnownImages, encoder_of, refuse_keys_of_another, write_keys
from data_prep.shards import discard
from data_prep.sources.base import SourceSplit, source_class, source_split
from data_prep.sources.image_states import source_state_file, store_source_state, stored_fingerprint
from data_prep.split import Place, Rewriting, prepare_split
from data_prep.verify import is_verified, mark_verified, unmark, verify_split
from pipeline.backbones.clip import KeyEncoder, key_identity
from pipeline.data.origin import SOURCE_FILES
from pipeline.data.shards import KEYS_TABLE, IndexedShards, read_description
from pipeline.errors import UserError
from pipeline.files.lock import lock_of, waiting_for
from pipeline.metrics.scoring import require_metrics

if TYPE_CHECKING:
    from pipeline.config.data import DataConfig, TaskConfig
    from pipeline.config.recipe import Recipe

SPLITS = ("train", "test")


def prepare(recipe: Recipe, progress: bool = True, replace: bool = False, gpus: int = 1) -> dict[str, Any]:
    """Prepare the data of a recipe; splits that are up to date are kept, and an interrupted preparation resumes.

    Returns `{"prepared": folder, "splits": [{task, split, samples, shards, fingerprint, wrote}], "skipped": [...]}`;
    `wrote` names what was written, and `skipped` describes the bad records that `data.skip_bad` allowed to leave out.
    Raises UserError for a source, CLIP or folder that is not as expected.

    Args:
        recipe: what to prepare.
        progress: whether progress bars are shown.
        replace: rewrite splits that another recipe's settings or a run depends on too (see `data_prep.split`).
        gpus: number of processes that compute the keys, each on its own GPU.
    """
    require_metrics([task.metric for task in recipe.data.tasks])
    identity = key_identity(*recipe.keys.source)
    source_class(recipe.data).draw(recipe.data)

    @cache
    def encoder() -> KeyEncoder:
        return encoder_of(recipe.keys)

    rewriting = Rewriting(replace, recipe.run_path.parent)
    clip = Clip(recipe.keys.batch, recipe.data.workers, identity, encoder, rewriting)
    tolerance = Tolerance(recipe.data.skip_bad)
    splits = []
    if gpus > 1:
        _write_shards_first(recipe.data, clip, progress)
        keys_by_processes(recipe, gpus)
    with progress_bars(progress) as bars:
        for task in recipe.data.tasks:
            for split in SPLITS:
                known = len(tolerance.skipped)
                splits.append(_prepare_split(recipe.data, task, split, clip, tolerance, bars))
                for record in tolerance.skipped[known:] if progress else ():
                    bars.console.print(f"left out: {record.sentence()}", style="yellow", markup=False, soft_wrap=True)
    skipped = [record.sentence() for record in tolerance.skipped]
    return {"prepared": recipe.data.prepared, "splits": splits, "skipped": skipped}


@dataclass
class Clip:
    """The frozen CLIP of a preparation, loaded when it is first needed, and the keys of images that it has encoded."""

    batch: int  # of texts and images that are encoded at once
    workers: int  # threads that decode images
    identity: dict[str, str]
    encoder: Callable[[], KeyEncoder]
    rewriting: Rewriting
    known_images: KnownImages = field(default_factory=dict)

    def write_keys(self, folder: Path, progress: Callable[[int], None]) -> bool:
        """Write the keys of a split unless they exist; UserError for keys of another recipe's CLIP."""
        if not self.rewriting.replace:
            refuse_keys_of_another(folder, self.identity)
        known = self.known_images
        return write_keys(folder, self.identity, self.encoder, self.batch, self.workers, progress, known)


def _prepare_split(
    data: DataConfig, task: TaskConfig, split: str, clip: Clip, tolerance: Tolerance, bars: Progress
) -> dict[str, Any]:
    name = f"{task.name}/{split}"
    source, folder = source_split(data, task, split), data.split_path(task.name, split)
    settings = data.split_settings(task, split)
    place = Place(folder, task.name, split, data.shard_samples, data.workers)
    bar = bars.add_task(f"{name}: shards", total=None)
    advance = partial(bars.advance, bar)
    ready = _ready(source, settings, place, clip.identity)
    if ready is not None and not clip.rewriting.replace:  # nothing is written, so the folder may be read-only
        description = _left_out_again(ready, tolerance)
        advance(description["count"])
        bars.update(bar, description=f"{name}: up to date", total=description["count"])
        return _result(description, [])
    with waiting_for(lock_of(folder), name):
        description, wrote_shards = prepare_split(source, settings, place, tolerance, clip.rewriting, advance)
        wrote = ["shards"] if wrote_shards else []
        bars.reset(bar, description=f"{name}: keys", total=description["count"])
        if clip.write_keys(folder, advance):
            wrote.append("keys")
        if wrote or not is_verified(folder, description["fingerprint"], clip.identity):
            bars.update(bar, description=f"{name}: verify")
            _verify(folder, description["fingerprint"], clip.identity)
        _store_source_state(folder, source, description)
    bars.update(bar, description=f"{name}: {'ready' if wrote else 'up to date'}")
    return _result(description, wrote)


def _write_shards_first(data: DataConfig, clip: Clip, progress: bool) -> None:
    """Write the shards of all splits before several processes compute their keys."""
    tolerance = Tolerance(data.skip_bad)
    with progress_bars(progress) as bars:
        for task in data.tasks:
            for split in SPLITS:
                source, folder = source_split(data, task, split), data.split_path(task.name, split)
                place = Place(folder, task.name, split, data.shard_samples, data.workers)
                bar = bars.add_task(f"{task.name}/{split}: shards", total=None)
                with waiting_for(lock_of(folder), f"{task.name}/{split}"):
                    settings, advance = data.split_settings(task, split), partial(bars.advance, bar)
                    prepare_split(source, settings, place, tolerance, clip.rewriting, advance)
                if not clip.rewriting.replace:
                    refuse_keys_of_another(folder, clip.identity)


def _ready(
    source: SourceSplit, settings: Mapping[str, Any], place: Place, identity: dict[str, str]
) -> dict[str, Any] | None:
    """dataset.json of a split that is complete, verified, and made from this source with these settings; else None."""
    folder, made = place.folder, source.origin(settings)
    try:
        description = read_description(folder)
        if any(description.get(name) != value for name, value in made.facts().items()):
            return None
        IndexedShards(folder).keys(identity)
    except UserError:
        return None
    same = description["source_fingerprint"] == made.fingerprint
    whole = is_verified(folder, description["fingerprint"], identity) and (folder / KEYS_TABLE).is_file()
    return description if same and whole and source_state_file(folder).is_file() else None


def _left_out_again(description: dict[str, Any], tolerance: Tolerance) -> dict[str, Any]:
    for record in description.get("skipped", []):
        tolerance.skip(BadRecord(**record))
    return description


def _result(description: dict[str, Any], wrote: list[str]) -> dict[str, Any]:
    return {
        "task": description["task"],
        "split": description["split"],
        "samples": description["count"],
        "shards": len(description["shards"]),
        "fingerprint": description["fingerprint"],
        "wrote": wrote,
    }


def _store_source_state(folder: Path, source: SourceSplit, description: dict[str, Any]) -> None:
    """Store the state of the source's files and images unless it is stored already."""
    fingerprint = description["source_fingerprint"]
    if stored_fingerprint(folder, source.root, source.text_names) != fingerprint:
        store_source_state(folder, fingerprint, description[SOURCE_FILES], source.images)


def _verify(folder: Path, fingerprint: str, identity: dict[str, str]) -> None:
    unmark(folder)
    try:
        verify_split(folder, identity)
    except UserError:
        discard(folder)  # so that the next call writes the split again, as the error message says
        raise
    mark_verified(folder, fingerprint, identity)


def progress_bars(enabled: bool) -> Progress:
    """The progress bars of a preparation."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(TextColumn("{task.description}"), *columns, disable=not enabled)
