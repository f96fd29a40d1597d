"""The runs of a comparison: every method with every seed, as recipes that are equal but for what is the method's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.config import registry
from pipeline.config.base import Section
from pipeline.config.comparison import ComparedMethod, as_entry
from pipeline.config.kinds import recipe_kind
from pipeline.config.messages import sentence
from pipeline.config.method import Choice, MethodOptions, choice_name, options_of
from pipeline.config.recipe import Recipe
from pipeline.config.task_file import with_task_files
from pipeline.config.yaml_file import apply_overrides, find_recipe, overlaid, read_recipe
from pipeline.errors import UserError, UserErrors, nearest

METHODS, TRAIN = "comparison.methods", "train"


@dataclass(frozen=True)
class ComparedRun:
    """One run: a method by its name in the comparison, a seed, and the recipe."""

    label: str
    seed: int
    recipe: Recipe

    @property
    def title(self) -> str:
        """What messages and files call it."""
        return f"{self.label}-s{self.seed}"


@dataclass(frozen=True)
class Comparison:
    """The runs that are compared, all methods with the first seed first, and the recipe that they have in common."""

    recipe: Recipe
    runs: tuple[ComparedRun, ...]

    @property
    def labels(self) -> list[str]:
        """The methods' names, in the order of the comparison."""
        return list(dict.fromkeys(run.label for run in self.runs))

    @property
    def seeds(self) -> list[int]:
        """The seeds, in order."""
        return list(dict.fromkeys(run.seed for run in self.runs))

    @property
    def folder(self) -> Path:
        """Where its page and tables are, unless another place is named: beside its runs."""
        return self.runs[0].recipe.run_path.parent / f"{self.recipe.name}-compared"

    def of(self, label: str) -> list[ComparedRun]:
        """The runs of one method."""
        return [run for run in self.runs if run.label == label]


def load_comparison(
    name_or_path: str, overrides: Iterable[str] = (), methods: Sequence[str] = (), seeds: Sequence[int] = ()
) -> Comparison:
    """The comparison that a recipe's section `comparison` describes.

    Args:
        name_or_path: the recipe.
        overrides: of the recipe, `a.b=value`; of one method, `METHOD.option=value` and `METHOD.train.lr_prompt=value`.
        methods: names of methods, or of entries of `comparison.methods`; empty: all entries.
        seeds: empty: those of the section.

    Raises UserErrors with a sentence for everything that is wrong.
    """
    if recipe_kind(name_or_path) == "clip":
        raise UserError(
            f"recipe '{name_or_path}' is a benchmark of prompt methods on CLIP, whose `run` compares its methods by "
            "itself; expected a task sequence."
        )
    fields = read_recipe(find_recipe(str(name_or_path)))
    section = fields.get("comparison") or {}
    if not isinstance(section, dict):
        raise UserError(f"recipe '{name_or_path}': comparison: found {section!r}, expected a group of fields.")
    entries = _chosen(section.get("methods") or [], methods)
    section = {**section, "methods": entries, **({"seeds": list(seeds)} if seeds else {})}
    labels = [str(entry.get("name")) for entry in entries if isinstance(entry, dict)]
    fields = with_task_files(
        apply_overrides({**fields, "comparison": section}, [_of_a_method(text, labels) for text in overrides])
    )
    recipe = _validated(fields, f"recipe '{name_or_path}'")
    comparison, wrong, runs = recipe.comparison, list[str](), list[ComparedRun]()
    for seed in comparison.seeds or (recipe.seed,):
        for entry in comparison.methods:
            try:
                runs.append(_run(entry, seed, fields, recipe, first=not runs))
            except UserError as error:
                wrong.append(str(error))
        if wrong:  # the other seeds have the same faults
            raise UserErrors(wrong)
    _require_equal(runs)
    return Comparison(recipe, tuple(runs))


def _chosen(known: Any, wanted: Sequence[str]) -> list[Any]:
    """The entries of these names, of those that are known or else bare; all known ones without names."""
    known = [as_entry(entry) for entry in known] if isinstance(known, list) else known
    if not isinstance(known, list):
        raise UserError(f"comparison.methods: found {known!r}, expected a list of methods.")
    if not wanted:
        if not known:
            raise UserError("There are no methods to compare; give --methods a,b or the recipe's comparison.methods.")
        return known
    named = {str(entry.get("name")): entry for entry in known if isinstance(entry, dict)}
    wrong, found = [], []
    for name in wanted:
        if name in named:
            found.append(named[name])
        elif registry.knows("methods", name):
            found.append(as_entry(name))
        else:
            offered = list(dict.fromkeys([*named, *registry.names("methods")]))
            wrong.append(
                f"--methods: there is no method '{name}'; expected some of {', '.join(offered)}."
                + nearest(name, offered)
            )
    if wrong:
        raise UserErrors(wrong)
    return found


def _of_a_method(override: str, labels: Sequence[str]) -> str:
    """An override of one method, `task_lora.alpha=4`, as one of its entry in the section; others stay as they are."""
    dotted, equals, value = override.partition("=")
    label = next((label for label in labels if dotted.strip().startswith(f"{label}.")), None)
    if label is None or label in Recipe.model_fields:
        return override
    inside = dotted.strip().removeprefix(f"{label}.")
    place = inside if inside.partition(".")[0] == TRAIN else f"options.{inside}"
    return f"{METHODS}.{label}.{place}{equals}{value}"


def _run(entry: ComparedMethod, seed: int, fields: Mapping[str, Any], recipe: Recipe, first: bool) -> ComparedRun:
    """One run's recipe; UserError where the method does not take its options."""
    name, comparison = entry.method_name, recipe.comparison
    if not registry.knows("methods", name):
        unknown = registry.unknown("methods", name)
        raise UserError(f"comparison: {unknown}")
    options = dict(entry.options)
    if comparison.targets is not None:
        options = _with_targets(options_of(name), options, list(comparison.targets))
    train = dict(entry.train)
    if recipe.train.budget is not None:
        train["budget"] = recipe.train.budget  # also where an option says another size
    above = {
        "method": {"name": name, **options},
        TRAIN: train,
        "seed": seed,
        "name": recipe.name if entry.name == name.replace(":", ".") else f"{recipe.name}-{entry.name}",
        # All runs are in one experiment, and the frozen model is scored once.
        "tracking": {"experiment": recipe.tracking.experiment or recipe.name},
        "evaluate": {"zero_shot": recipe.evaluate.zero_shot and first},
        "data": {"prepared": recipe.data.prepared},
    }
    below = {key: value for key, value in fields.items() if key != "comparison"}
    return ComparedRun(entry.name, seed, _validated(overlaid(below, above), f"comparison, method {entry.name}"))


def _with_targets(kind: type[MethodOptions], options: dict[str, Any], targets: list[str]) -> dict[str, Any]:
    """A method's options with these layers for its low-rank updates, where it has any and says none itself."""
    if "targets" in kind.model_fields:
        return {"targets": targets, **options}
    part = options.get("part")
    if part is None or "targets" not in _part_options(part).model_fields:
        return options
    return {**options, "part": {"targets": targets, **({"name": part} if isinstance(part, str) else part)}}


def _targets(method: MethodOptions) -> tuple[str, ...] | None:
    """The layers that a method's low-rank updates change; None of a method without any."""
    found, part = getattr(method, "targets", None), getattr(method, "part", None)
    if found is None and part is not None and "targets" in (fields := _part_options(part).model_fields):
        found = part["targets"] if isinstance(part, Mapping) and "targets" in part else fields["targets"].default
    return None if found is None else tuple(found)


def _part_options(part: Choice) -> type[Section]:
    """The class of the options that a chosen part has."""
    options: type[Section] = registry.load("parts", choice_name(part)).Options
    return options


def _validated(fields: Mapping[str, Any], place: str) -> Recipe:
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        raise UserError(f"{place}: {sentence(error, Recipe)}") from error


def _require_equal(runs: Sequence[ComparedRun]) -> None:
    """Raise UserErrors where runs would share a folder, or low-rank methods would change different layers."""
    wrong, folders, targets = [], dict[Path, str](), dict[str, tuple[str, ...]]()
    for run in runs:
        path = run.recipe.run_path
        if path in folders:
            wrong.append(
                f"The runs {folders[path]} and {run.title} would both be in {path}; put {{method}} and {{seed}} into "
                "run_dir."
            )
        folders.setdefault(path, run.title)
        found = _targets(run.recipe.method)
        if found is not None:
            targets[run.label] = found
    if len(set(targets.values())) > 1:
        listed = "; ".join(f"{label}: {', '.join(layers)}" for label, layers in targets.items())
        wrong.append(
            f"The compared methods would update different layers ({listed}), and at equal layers alone their sizes and "
            "scores are comparable; set comparison.targets, or the same `targets` for each."
        )
    if wrong:
        raise UserErrors(wrong)
