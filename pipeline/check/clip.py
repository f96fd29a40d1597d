"""`check` of a CLIP benchmark: datasets, backbone, learned parameters, steps, run folder, and memory plan."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel

from data_prep.benchmark import few_shot_rows
from data_prep.sources.split_zhou import altered, missing, read_dataset
from pipeline.check.clip_backbone import check_backbone
from pipeline.check.clip_descriptions import check_descriptions
from pipeline.check.clip_search import check_searches
from pipeline.check.device import Device
from pipeline.check.findings import Findings, amount, counted, peak, run_checks, show
from pipeline.clip.benchmark.prepared import refuse_other_settings, require_prepared
from pipeline.clip.images.classes import Group, base_classes
from pipeline.clip.images.prepared import CLASSES_FILE, ClassList, PreparedDataset
from pipeline.clip.learning.few_shot_batches import micro_batches
from pipeline.clip.learning.memory_plan import plan_benchmark
from pipeline.clip.learning.protocol import small_set_warning, steps_per_epoch
from pipeline.clip.learning.unit import units_of
from pipeline.clip.recipe import ClipRecipe, datasets_of, load_benchmark
from pipeline.clip.recipe_active import ActiveConfig, refuse_small_pool
from pipeline.clip.recipe_data import ClipDataConfig, DatasetConfig
from pipeline.clip.towers.backbone import Sizes
from pipeline.errors import UserError, UserErrors, require_extras
from pipeline.files.paths import command
from pipeline.hub import repository as hub
from pipeline.hub.known_models import known_config
from pipeline.ranks.devices import require_usable_gpus, torch_build
from pipeline.runs.claim import claim_run
from pipeline.runs.layout import COMPLETE
from pipeline.training.deepspeed_config import deepspeed_file

FEW = 4  # most datasets with an unusual number of steps that are listed by name


def check_benchmark(
    name: str, overrides: Iterable[str], ranks: int | None = None, gpu_memory: float | None = None
) -> Findings:
    """Check a benchmark's recipe on this machine and print the results; problems are in the result, not raised.

    `ranks` and `gpu_memory` as for `pipeline.check.sequence.check`.
    """
    recipe = load_benchmark(name, overrides)
    findings = Findings(device=Device.of(gpu_memory))
    ranks = findings.device.ranks(ranks, recipe)
    with hub.no_waiting([recipe.model.location]) as online:
        checks = {
            "recipe": lambda: _recipe(recipe),
            "ranks": lambda: _ranks(recipe, ranks),
            "deepspeed": lambda: _deepspeed(recipe),
            "model": lambda: check_backbone(recipe.model, recipe.methods, online, here=not findings.device.asked),
            "data": lambda: _data(findings, recipe, name),
            "steps": lambda: _steps(findings, recipe),
            "run folder": lambda: _run_folder(recipe),
            "memory": lambda: _memory(findings, recipe, ranks),
        }
        if any(method.descriptions is not None for method in recipe.methods):
            checks["descriptions"] = lambda: check_descriptions(recipe)
        run_checks(findings, checks)
    show(findings, name)
    return findings


def _recipe(recipe: ClipRecipe) -> str:
    require_extras("train", *recipe.tracking.extras)
    parts = {"method": recipe.methods, "dataset": recipe.data.datasets, "seed": recipe.seeds}
    counts = [counted(len(entries), what) for what, entries in parts.items()]
    counts += [counted(len(recipe.data.targets), "target")] if recipe.data.targets else []
    units = counted(len(units_of(recipe)), "unit")
    return f"{recipe.name}: {recipe.data.protocol}, {', '.join(counts)}: {units}"


def _ranks(recipe: ClipRecipe, ranks: int) -> str:
    require_usable_gpus()
    parts: dict[str, list[str]] = {}
    for method in recipe.methods:
        train = recipe.train_of(method)
        micro, steps = micro_batches(train.global_batch, train.micro_batch, ranks)
        parts.setdefault(f"{micro} x {steps} of {train.global_batch}", []).append(method.name)
        search = method.search
        if search is not None and search.like is None:  # otherwise it is another row's
            micro, steps = micro_batches(search.global_batch, train.micro_batch, ranks)
            parts.setdefault(f"{micro} x {steps} of {search.global_batch}", []).append(f"the search of {method.name}")
    listed = "; ".join(f"{sizes}: {', '.join(methods)}" for sizes, methods in parts.items())
    return f"{ranks}, images per forward and step {listed}; {torch_build()}"


def _deepspeed(recipe: ClipRecipe) -> str:
    stage = deepspeed_file(recipe.train.deepspeed).get("zero_optimization", {}).get("stage", 0)
    return f"{recipe.train.deepspeed}: ZeRO stage {stage}, {recipe.model.dtype}"


def _data(findings: Findings, recipe: ClipRecipe, name: str) -> str:
    found, wrong, unprepared = [], [], []
    doubts: list[str] = []
    for entry, trained in datasets_of(recipe):
        folder = Path(recipe.data.prepared) / entry.name
        if (folder / CLASSES_FILE).is_file():
            try:
                data = PreparedDataset(folder)
                refuse_other_settings(recipe.data, entry, trained, data)
            except UserError as error:
                wrong.append(str(error))
                continue
            if trained and data.train is not None:
                wrong += _small_pools(recipe, entry.name, len(data.train), len(data.classes.names))
                if all(str(seed) in data.classes.validation for seed in recipe.seeds):
                    problems, warnings = check_searches(recipe, entry.name, data)
                    wrong, doubts = wrong + problems, doubts + warnings
            sizes = "/".join(str(len(part)) for part in (data.train, data.test) if part is not None)
            without = "" if data.labelled else " without labels" + ", none to score on" * (data.test is None)
            found.append(f"{entry.name} {len(data.classes.names)} classes, {sizes} images{without}")
        else:
            unprepared.append(entry)
            problems, notes, warnings = _source(recipe, entry, trained)
            wrong, doubts = wrong + problems, doubts + warnings
            found += [f"note: {note}" for note in notes]
    if not unprepared and not wrong and not recipe.data.prepare_first:
        require_prepared(recipe, name)
    if unprepared and recipe.data.prepare_first:
        found.append(f"{counted(len(unprepared), 'dataset')} that `run` prepares first")
    elif unprepared:
        names = ", ".join(f"'{entry.name}'" for entry in unprepared)
        wrong.append(
            f"datasets {names} are not prepared; run `{command('prepare', name)}`"
            f"{' once the data is there' * bool(wrong)}."
        )
    if doubts:
        findings.warnings["data"] = doubts
    if wrong:
        raise UserErrors(wrong)
    return "\n".join([f"{recipe.data.prepared}:", *found])


def _source(recipe: ClipRecipe, entry: DatasetConfig, trained: bool) -> tuple[list[str], list[str], list[str]]:
    """(problems of a dataset that is not prepared, differences from the published one, warnings)."""
    data = recipe.data
    if data.source == "generated":
        return [], [], []
    description, root = entry.description, Path(data.root)
    problems, warnings = missing(description, root), list[str]()
    if trained and not problems:
        try:
            splits = read_dataset(description, root)
            few_shot_rows(data, recipe.seeds, splits, entry.name)
            problems = _small_pools(recipe, entry.name, len(splits.train), len(splits.names()))
            wrong, warnings = check_searches(recipe, entry.name, splits)
            problems += wrong
        except UserError as error:
            problems = [str(error)]
    return problems, altered(description, root), warnings


def _small_pools(recipe: ClipRecipe, dataset: str, pool: int, classes: int) -> list[str]:
    """A sentence for each row that asks for more labels than the pool of a dataset can give."""
    found = []
    for method in recipe.methods:
        try:
            refuse_small_pool(recipe.active or ActiveConfig(), method, pool, classes, f"{method.name}, {dataset}")
        except UserError as error:
            found.append(str(error))
    return found


def _steps(findings: Findings, recipe: ClipRecipe) -> str:
    """Optimizer steps by method, where the numbers of classes are known; warns of batches larger than an epoch."""
    steps: dict[str, dict[str, int]] = {}
    searches: dict[str, dict[str, int]] = {}  # fewer where training images are held out for the validation
    large: dict[str, list[str]] = {}
    for unit in units_of(recipe):
        if not unit.learns or unit.seed != recipe.seeds[0]:
            continue
        images = _images(recipe.data, recipe.seeds[0], unit.dataset, unit.group == "base")
        if images is None:
            continue
        train, dataset = recipe.train_of(unit.method, unit.dataset.name), unit.dataset.name
        counts = _labelled(recipe, dataset) if unit.method.asks else [images]
        steps.setdefault(unit.method.name, {})[dataset] = train.epochs * sum(
            steps_per_epoch(count, train.global_batch) for count in counts
        )
        if unit.search is not None and unit.search == unit.method.search:  # otherwise it is another row's
            each = steps_per_epoch(images, unit.search.global_batch)
            searches.setdefault(unit.method.name, {})[dataset] = unit.search.epochs * each
        images = counts[-1]
        if small_set_warning(images, train.global_batch, train.epochs):
            sets = f"{dataset} ({counted(images, 'image')}, {counted(train.epochs, 'step')} in all)"
            large.setdefault(f"the batch of {train.global_batch} of {unit.method.name}", []).append(sets)
    if large:
        findings.warnings["steps"] = [
            f"{batch} is larger than the training set of {', '.join(sets)}, where an epoch is one step; set a smaller "
            "train.global_batch, or more epochs."
            for batch, sets in large.items()
        ]
    lines = [_in_short(method, by_dataset) for method, by_dataset in steps.items()]
    lines += [_in_short(f"the search of {method}", by_dataset) for method, by_dataset in searches.items()]
    return "\n".join(lines) or "not known before the data is prepared"


def _labelled(recipe: ClipRecipe, dataset: str) -> list[int]:
    """The number of labelled images that a row trains on in each round."""
    active = recipe.active or ActiveConfig()
    labels = active.labels(max(1, _classes(recipe, dataset, "all")))
    return [labels * (number + 1) for number in range(active.rounds)]


def _in_short(method: str, steps: dict[str, int]) -> str:
    """The steps of a method: the most frequent number and the datasets with another one, or the range of numbers."""
    (usual, times), *_ = Counter(steps.values()).most_common()
    others = [f"{dataset} {count}" for dataset, count in steps.items() if count != usual]
    if len(others) <= min(times, FEW):
        return f"{method} {usual}" + (f", but {', '.join(others)}" if others else "")
    least, most = min(steps, key=steps.__getitem__), max(steps, key=steps.__getitem__)
    return f"{method} {steps[least]} ({least}) to {steps[most]} ({most})"


def _images(data: ClipDataConfig, seed: int, entry: DatasetConfig, base: bool) -> int | None:
    folder = Path(data.prepared) / entry.name
    if (folder / CLASSES_FILE).is_file():
        prepared = PreparedDataset(folder)
        if not prepared.labelled:
            return len(prepared.classes.train)
        return len(prepared.few_shots(seed, "base" if base else "all").rows)
    known = entry.description
    classes = known.base if base else known.classes
    return classes * data.shots if data.shots and classes else None


def _memory(findings: Findings, recipe: ClipRecipe, ranks: int) -> str:
    """Plan the memory; obstacles have been reported by the checks that they belong to."""
    if {"ranks", "deepspeed"} & findings.problems.keys():
        return "not planned: ranks or DeepSpeed file are wrong"
    learned, tested = [], []
    for unit in units_of(recipe):
        learned.append(_classes(recipe, unit.dataset.name, unit.group))
        tested += [_classes(recipe, dataset, group) for _, dataset, group in unit.groups]
    if not all(learned):
        return "not planned: the number of classes is not known before the data is prepared"
    model = recipe.model
    known = ""
    try:
        folder = hub.local_folder(model.location, model.revision)
        if folder is None:
            known = f"; by this project's built-in sizes of {model.path}, which is not on this machine"
        config = known_config(model.path) if folder is None else AutoConfig.from_pretrained(folder)
        Sizes.of(config)
        with torch.device("meta"):
            built = AutoModel.from_config(config, dtype=getattr(torch, model.dtype))
        plan = findings.memory = plan_benchmark(recipe, ranks, built, max(learned), max(tested, default=0))
    except (OSError, ValueError, UserError):
        return f"not planned: the configuration of '{model.path}' is not available here, or is of another kind"
    if findings.fits() is False:
        findings.warnings["memory"] = [
            f"a rank needs {amount(plan.most)}, and {findings.device.room()} may be planned; lower train.micro_batch, "
            "evaluate_batch or model.text_chunk, or choose a smaller model.path"
        ]
    return peak(plan, findings.device) + known


def _classes(recipe: ClipRecipe, dataset: str, group: Group) -> int:
    """The number of classes of a group; 0 where it is not known yet."""
    entry = next(entry for entry, _ in datasets_of(recipe) if entry.name == dataset)
    count = entry.description.classes
    with contextlib.suppress(UserError):
        count = len(ClassList.read(Path(recipe.data.prepared) / dataset).names)
    return {"all": count, "base": base_classes(count), "new": count - base_classes(count)}[group]


def _run_folder(recipe: ClipRecipe) -> str:
    path = recipe.run_path
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return f"{path} (new)"
    claim_run(recipe)  # writes nothing into an existing run
    done = sum(1 for unit in units_of(recipe) if (unit.folder(path) / COMPLETE).is_file())
    return f"{path} ({done} units trained)"
