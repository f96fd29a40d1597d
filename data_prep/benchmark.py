"""Prepares the data of a CLIP benchmark: for each dataset, the test images and the few-shot subsets of all seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import Progress

from data_prep.bad_records import Tolerance
from data_prep.prepare import progress_bars
from data_prep.sources import colour_shapes
from data_prep.sources.class_folders import ImageSplit
from data_prep.sources.split_zhou import missing, missing_images, missing_sentence, read_dataset
from data_prep.split import Place, Rewriting, prepare_split
from pipeline.clip.images.classes import UNLABELLED, LabelledImage, Split, Splits
from pipeline.clip.images.datasets import Dataset
from pipeline.clip.images.few_shot import few_shot
from pipeline.clip.images.prepared import ClassList
from pipeline.clip.recipe import ClipRecipe, datasets_of
from pipeline.clip.recipe_data import ClipDataConfig, DatasetConfig
from pipeline.data.shards import IndexedShards
from pipeline.errors import UserError
from pipeline.files.lock import lock_of, waiting_for


def prepare_benchmark(recipe: ClipRecipe, progress: bool = True, replace: bool = False) -> dict[str, Any]:
    """Prepare all datasets of a recipe; splits that are up to date are kept.

    Splits that another recipe's settings or a run depends on are rewritten only with `replace` (see `data_prep.split`).
    Of a training split only the images that some seed draws are written. Returns `{"prepared": folder, "splits":
    [{dataset, split, samples, fingerprint, wrote}], "skipped": [...]}`. Raises UserError for data that is missing, not
    as expected, or has too few images for the shots.
    """
    root = Path(recipe.data.root)
    if recipe.data.source == "generated":
        with waiting_for(lock_of(root), "the generated data"):
            colour_shapes.draw(root, recipe.data.seed)
    tolerance = Tolerance(recipe.data.skip_bad)
    splits: list[dict[str, Any]] = []
    with progress_bars(progress) as bars:
        for entry, trained in datasets_of(recipe):
            with waiting_for(lock_of(Path(recipe.data.prepared) / entry.name), entry.name):
                splits += _prepare_dataset(recipe, entry, trained, tolerance, bars, replace)
    return {"prepared": recipe.data.prepared, "splits": splits, "skipped": [r.sentence() for r in tolerance.skipped]}


def _prepare_dataset(
    recipe: ClipRecipe, entry: DatasetConfig, trained: bool, tolerance: Tolerance, bars: Progress, replace: bool
) -> list[dict[str, Any]]:
    """Prepare one dataset, whose lock the caller holds; returns the entries of `prepare_benchmark` for its splits."""
    data, root, description = recipe.data, Path(recipe.data.root), entry.description
    if not (root / description.folder).is_dir():
        raise UserError(missing(description, root)[0])
    found = read_dataset(description, root)
    seeds: dict[int, list[int]] = {}
    validation: dict[int, list[int]] = {}
    if trained:
        known = _prepared(data, entry.name)
        wanted = [*recipe.seeds, *known]
        seeds = few_shot_rows(data, wanted, found, description.name)
        # A search needs them; where an earlier recipe's did, they stay, for all seeds.
        if recipe.searches or any(known.values()):
            validation = validation_rows(data, wanted, found)
    parts: dict[Split, tuple[LabelledImage, ...]] = {"test": found.test} if entry.tested else {}
    every: dict[Split, dict[int, list[int]]] = {"train": seeds, "val": validation}
    for split, drawn in every.items():
        rows = sorted({row for part in drawn.values() for row in part})
        if rows:
            parts[split] = tuple(found.of(split)[row] for row in rows)
    images = root / description.folder / description.images
    _refuse_missing(description, images, parts, data)
    fingerprints: dict[str, str] = {}
    splits: list[dict[str, Any]] = []
    for split, part in parts.items():
        bar = bars.add_task(f"{entry.name}/{split}", total=len(part))
        place = Place(data.split_path(entry.name, split), entry.name, split, data.shard_samples, data.workers)
        # Of images that nobody has labelled none is missed; labels already given are those of the pool as it was.
        free = split == "test" or not entry.labelled
        left_out = tolerance if free else Tolerance(0, may_grow=False)
        rewriting = Rewriting(replace, recipe.run_path.parent, may_grow=not free)
        written, wrote = prepare_split(
            ImageSplit(part, images),
            data.split_settings(entry, split),
            place,
            left_out,
            rewriting,
            partial(bars.advance, bar),
        )
        fingerprints[split] = written["fingerprint"]
        splits.append(
            {
                "dataset": entry.name,
                "split": split,
                "samples": written["count"],
                "fingerprint": written["fingerprint"],
                "wrote": wrote,
            }
        )
    _write_classes(data, entry.name, found, parts, every, fingerprints)
    return splits


def _prepared(data: ClipDataConfig, name: str) -> dict[int, bool]:
    """Seeds whose subsets are prepared already, and whether with validation images.

    They are kept, because another recipe may use them.
    """
    try:
        found = ClassList.read(Path(data.prepared) / name)
    except UserError:
        return {}
    kept = found.few_shot if found.sampling == _sampling(data) else []
    return {int(seed): seed in found.validation for seed in kept}


def _known_test(data: ClipDataConfig, name: str) -> str | None:
    try:
        return ClassList.read(Path(data.prepared) / name).fingerprints.get("test")
    except UserError:
        return None


def _sampling(data: ClipDataConfig) -> dict[str, Any]:
    return {"shots": data.shots, "fewer": data.fewer}


def few_shot_rows(data: ClipDataConfig, seeds: Iterable[int], splits: Splits, name: str) -> dict[int, list[int]]:
    """By seed, the indices of its few-shot subset in the training split, in the order in which they were drawn.

    Raises UserError that names the dataset when it has no training images, or a class has fewer than the shots.
    """
    if not splits.train:
        raise UserError(f"{name} has no training images; it can be a target, but not be trained on.")
    seeds = sorted(set(seeds))
    if data.shots is None:
        return {seed: list(range(len(splits.train))) for seed in seeds}
    places = {image: place for place, image in enumerate(splits.train)}
    try:
        drawn = {seed: few_shot(splits, data.shots, seed, data.fewer).train for seed in seeds}
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    return {seed: [places[image] for image in images] for seed, images in drawn.items()}


def validation_rows(data: ClipDataConfig, seeds: Iterable[int], splits: Splits) -> dict[int, list[int]]:
    """By seed, the indices of its validation images in the validation split, in the order in which they were drawn."""
    seeds = sorted(set(seeds))
    if data.shots is None:
        return {seed: list(range(len(splits.val))) for seed in seeds}
    places = {image: place for place, image in enumerate(splits.val)}
    return {seed: [places[i] for i in few_shot(splits, data.shots, seed, data.fewer).val] for seed in seeds}


def _refuse_missing(
    description: Dataset, images: Path, parts: Mapping[Split, tuple[LabelledImage, ...]], data: ClipDataConfig
) -> None:
    lacking = missing_images(Splits(parts.get("train", ()), parts.get("val", ()), parts.get("test", ())), images)
    if len(lacking) > data.skip_bad:
        where = f" {description.instructions(data.root)}" if description.download else ""
        raise UserError(f"{description.name}: {missing_sentence(lacking, images)}{where}")


def _write_classes(
    data: ClipDataConfig,
    name: str,
    splits: Splits,
    parts: Mapping[Split, tuple[LabelledImage, ...]],
    drawn: dict[Split, dict[int, list[int]]],
    fingerprints: dict[str, str],
) -> None:
    """Write the label of each row of the shards, and by split and seed the rows that were drawn.

    Images that `skip_bad` left out have no row.
    """
    seeds = drawn["train"]
    order = {label: number for number, label in enumerate(sorted({i.label for part in _all(splits) for i in part}))}
    if splits.classes is not None:  # labels count the given classes
        order = {label: label for label in (UNLABELLED, *range(len(splits.classes)))}
    labels = {split: {image.path: order[image.label] for image in part} for split, part in parts.items()}
    rows = {
        split: [labels[split][identity] for identity in IndexedShards(data.split_path(name, split)).ids]
        for split in parts
    }
    few = _places(seeds) if splits.classes is None else {}  # without labels there is nothing to draw by class
    validation = _places(drawn["val"])
    if not seeds and _known_test(data, name) == fingerprints.get("test"):
        return  # another recipe trains on this dataset, which is a target here: keep its few-shot subsets
    sampling = _sampling(data) if seeds else {}
    ClassList(
        splits.names(),
        rows.get("train", []),
        rows.get("test", []),
        few,
        sampling,
        fingerprints,
        val=rows.get("val", []),
        validation=validation,
    ).write(Path(data.prepared) / name)


def _places(drawn: dict[int, list[int]]) -> dict[str, list[int]]:
    """By seed, the places of its rows among the rows of all seeds, which alone are in the shards."""
    place = {row: number for number, row in enumerate(sorted({row for rows in drawn.values() for row in rows}))}
    return {str(seed): [place[row] for row in chosen] for seed, chosen in drawn.items()}


def _all(splits: Splits) -> tuple[tuple[LabelledImage, ...], ...]:
    return splits.train, splits.val, splits.test
