"""Reads a recipe's YAML: finds its file, applies `extends` and `--set` overrides; validation is elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from pipeline.config import registry
from pipeline.errors import UserError, nearest
from pipeline.files.paths import expanded
from pipeline.files.strict_text import load_yaml, plain_words, quoting

CONFIG = "config.yaml"  # the recipe of a run, in its folder
STATE = "run.json"  # the state of a run, in its folder
WRITTEN = (CONFIG, STATE, "adapter.json")  # files by which the folder of a run or of an adapter is recognised
RECIPES = Path(__file__).parents[1] / "recipes"
# Two fields for the same quantity. Where both are given together, the second is used. Where the first is given later
# (by --set, or in a recipe that extends the one with the second), it removes the second.
OVERRULED = {
    "train.epochs": "train.steps",
    "method.rank": "train.budget",
    "method.prompt_length": "train.budget",
    "method.prefix_length": "train.budget",
    "method.pool_length": "train.budget",
    "method.task_length": "train.budget",
    "method.component_length": "train.budget",
}
# Groups whose fields depend on their `name`, with the kind of extension that it names and its default. Where another
# name is given later, options that only the earlier one has are dropped.
NAMED = {"method": ("methods", "modalprompt")}
CHOSEN_BY_NAME = {"data.tasks": "task", "methods": "method"}  # lists from which --set can select items by name


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the project."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def find_recipe(name_or_path: str, beside: Path | None = None) -> Path:
    """Return the file of a recipe's name or path; a name is searched in `beside`, then among the shipped recipes.

    Raises UserError with the nearest shipped name when there is no such file.
    """
    name_or_path = expanded(name_or_path)
    given = Path(name_or_path)
    if given.is_dir() and any((given / file).exists() for file in WRITTEN):
        own = f"; the one that it was made with is '{given / CONFIG}'" if (given / CONFIG).is_file() else ""
        raise UserError(f"'{name_or_path}' is the folder of a run or an adapter; expected a recipe{own}.")
    if given.suffix in {".yaml", ".yml"} or given.name != name_or_path:
        candidates = [given] if beside is None else [beside / given, given]
        for candidate in candidates:
            if candidate.is_file():
                return candidate
        raise UserError(
            f"{'a folder and ' * given.is_dir()}no recipe file at '{name_or_path}'."
            f"{nearest(given.stem, recipe_names())} Expected a YAML file or one of {_listed(recipe_names())}."
        )
    for folder in (beside, RECIPES):
        if folder is not None and (folder / f"{name_or_path}.yaml").is_file():
            return folder / f"{name_or_path}.yaml"
    raise UserError(
        f"unknown recipe '{name_or_path}'.{nearest(name_or_path, recipe_names())} Expected one of "
        f"{_listed(recipe_names())}, or the path of a YAML file."
    )


def read_recipe(path: Path, _children: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the fields of a recipe file over those of the recipe it `extends` (mappings merge, lists replace)."""
    if path.resolve() in _children:
        chain = " -> ".join(child.name for child in (*_children, path))
        raise UserError(f"recipe '{path}' extends itself ({chain}); remove one `extends`.")
    fields = _read_yaml(path)
    fields.setdefault("name", path.stem)
    parent = fields.pop("extends", None)
    if parent is None:
        return fields
    if not isinstance(parent, str):
        raise UserError(f"extends in '{path}': found {parent!r}, expected the name or path of one recipe.")
    return overlaid(read_recipe(find_recipe(parent, beside=path.parent), (*_children, path.resolve())), fields)


def overlaid(below: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a recipe over those of another: mappings merge, lists replace, another name drops its options."""
    below = copy.deepcopy(below)
    for path_above in OVERRULED:
        if _has(fields, path_above):
            _overrule(below, path_above)
    for group in NAMED:
        given = fields.get(group)
        if isinstance(given, dict) and isinstance(below.get(group), dict):
            _rename(below, group, given.get("name"))
            # A choice with options of its own, such as a rule, replaces the earlier choice instead of merging with it.
            below[group] = {k: v for k, v in below[group].items() if not (isinstance(v, dict) and k in given)}
    return _merged(below, fields)


def apply_overrides(fields: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return `fields` with each `a.b=value` set; the value is YAML, a list is entered by index or by an item's name.

    `data.tasks=[A, B]` chooses from the recipe's own tasks, in that order, and `methods=[A]` from its methods.
    """
    fields = copy.deepcopy(fields)
    names = [f"{group}.name" for group in NAMED]
    # Names first, because options that are given with a name belong to it, in whatever order.
    for override in sorted(overrides, key=lambda text: text.partition("=")[0].strip() not in names):
        dotted, equals, text = override.partition("=")
        dotted = dotted.strip()
        if not equals or not all(dotted.split(".")):
            raise UserError(f"--set {override!r} is not an assignment; expected field.name=value.")
        try:
            value = load_yaml(text)
            unquoted = plain_words(text) if dotted in CHOSEN_BY_NAME else []
        except yaml.YAMLError as error:
            raise UserError(f"--set {dotted}: {text!r} is not YAML ({_problem(error)}); quote the value.") from error
        except UserError as error:
            raise UserError(f"--set {dotted}: {error}.") from None
        if unquoted:
            raise UserError(f"--set {dotted}: {quoting(unquoted)}.")
        if dotted in names:
            _rename(fields, dotted.removesuffix(".name"), value)
        _set(fields, dotted, value)
        _overrule(fields, dotted)
    return fields


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"recipe '{path}' is not YAML: {_problem(error)}; mend that line.") from error
    except UserError as error:
        raise UserError(f"recipe '{path}': {error}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe '{path}' cannot be read ({error}); expected a text file.") from error
    if not isinstance(content, dict):
        raise UserError(f"recipe '{path}' holds no fields; expected lines such as `name: my_recipe`.")
    return content


def _problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    reason = getattr(error, "problem", None) or "unreadable"
    return f"line {mark.line + 1}, {reason}" if mark is not None else str(reason)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        merged[key] = _merged(under, value) if isinstance(under, dict) and isinstance(value, dict) else value
    return merged


def _set(fields: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    where: Any = fields
    for depth, part in enumerate(parents):
        where = where.setdefault(part, {}) if isinstance(where, dict) else where[_position(where, part, dotted)]
        if not isinstance(where, dict | list):
            inside = ".".join(parents[: depth + 1])
            raise UserError(f"--set {dotted}: {inside} is a single value ({where!r}), it has no field inside.")
    if isinstance(where, list):
        where[_position(where, last, dotted)] = value
    elif dotted in CHOSEN_BY_NAME:
        where[last] = _chosen(dotted, where.get(last), value)
    else:
        where[last] = value


def _has(fields: Any, dotted: str) -> bool:
    for part in dotted.split("."):
        if not isinstance(fields, dict) or part not in fields:
            return False
        fields = fields[part]
    return True


def _overrule(fields: dict[str, Any], dotted: str) -> None:
    """Remove the field that the given field `dotted` replaces."""
    other = OVERRULED.get(dotted)
    if other is not None and _has(fields, other):
        *parents, last = other.split(".")
        for part in parents:
            fields = fields[part]
        del fields[last]


def _rename(fields: dict[str, Any], group: str, name: Any) -> None:
    """Drop the options of a named group that exist for its present name and not for the new one."""
    kind, default = NAMED[group]
    inside = fields.get(group)
    present = inside.get("name", default) if isinstance(inside, dict) else name
    known = [registry.knows(kind, given) if isinstance(given, str) else False for given in (present, name)]
    if not isinstance(inside, dict) or present == name or not all(known):
        return
    old, new = (registry.load(kind, given).Options.model_fields for given in (present, name))
    fields[group] = {field: value for field, value in inside.items() if field in new or field not in old}


def _position(items: list[Any], part: str, dotted: str) -> int:
    names = [str(item.get("name")) for item in items if isinstance(item, dict)]
    if part in names:
        return names.index(part)
    if part.isdecimal() and int(part) < len(items):
        return int(part)
    if part in items:
        raise UserError(
            f"--set {dotted}: '{part}' is a bare name in the recipe, with no field inside; expected a group of fields. "
            f"Write `- name: {part}` there."
        )
    raise UserError(
        f"--set {dotted}: no item '{part}'; expected 0 to {len(items) - 1} or one of {_listed(names)}."
        + nearest(part, names)
    )


def _chosen(dotted: str, known: Any, wanted: Any) -> Any:
    """Return the known items that a list of names selects; any other value is left to the recipe's validation."""
    if isinstance(wanted, str):
        wanted = [wanted]
    if not isinstance(wanted, list) or not all(isinstance(name, str) for name in wanted) or not isinstance(known, list):
        return wanted
    items = {str(item.get("name") if isinstance(item, dict) else item): item for item in known}
    for name in wanted:
        if name not in items:
            raise UserError(
                f"--set {dotted}: unknown {CHOSEN_BY_NAME[dotted]} '{name}'; expected some of {_listed(list(items))}."
                f"{nearest(name, items)} Bare names select among the recipe's; another one is written {{name: {name}}}."
            )
    return [items[name] for name in wanted]


def _listed(names: list[str]) -> str:
    return ", ".join(names) if names else "(none)"
