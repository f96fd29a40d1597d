"""Generates the page of all recipe fields: `python -m pipeline.recipe_docs > docs/recipes.md`."""

from __future__ import annotations

import json
import types
from collections.abc import Container, Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipeline.clip.recipe import ClipRecipe
from pipeline.config import registry
from pipeline.config.messages import model_in, variants_of
from pipeline.config.method import FromRegistry
from pipeline.config.recipe import Recipe

HEAD = """# Every field of a recipe

Written by `python -m pipeline.recipe_docs` from the descriptions in `pipeline/config/`, `pipeline/methods/` and
`pipeline/clip/recipe.py`; change it there. A recipe may `extends:` another, whose groups it then adds to and whose
lists it replaces; where it names another method, options that it does not have are dropped. On the command line
`--set train.epochs=3` is a field, `--set data.tasks.Count.limit_test=50` one of an item by its name. Why a switch
exists and what it does to numbers is in [switches](switches.md).
"""
WORDS = {int: "whole number", float: "number", str: "text", bool: "true or false"}
BOUNDS = {"ge": "from {}", "gt": "above {}", "le": "to {}", "lt": "below {}"}


def page() -> str:
    """Return the page in Markdown: each kind of recipe, and in it a table per group of fields."""
    parts = [HEAD]
    for title, recipe in (("A task sequence", Recipe), ("A benchmark of prompt methods on CLIP", ClipRecipe)):
        parts += [f"## {title}\n", *_groups(recipe, "", {})]
    return "\n".join(parts)


def _groups(
    model: type[BaseModel], place: str, shown: dict[type[BaseModel], str], named: str = "", without: Container[str] = ()
) -> Iterator[str]:
    """The table of a group, then those of its inner groups that have not been `shown`.

    Args:
        model: the group.
        place: its dotted path.
        shown: groups that have a table already, with their paths; it is extended.
        named: for a group whose fields depend on its name: the names that this table is for.
        without: common fields that this table leaves out.
    """
    rows, inside = list[str](), list[tuple[type[BaseModel], str]]()
    for name, info in model.model_fields.items():
        if name in without:
            continue
        inner = model_in(info.annotation)
        if inner is None:
            rows.append(f"| `{name}` | {_kind(info.annotation, info)} | {_default(info)} | {_cell(info.description)} |")
            continue
        many = get_origin(info.annotation) is tuple
        if inner not in shown:
            shown[inner] = f"{place}.{name}".lstrip(".") + ("[]" if many else "")
            inside.append((inner, shown[inner]))
        what = info.description or (inner.__doc__ or "").strip().splitlines()[0]
        default = "required" if info.is_required() else "none" if many or info.default is None else "as below"
        kind = f"{'list of groups' if many else 'group'} `{shown[inner]}`"
        rows.append(f"| `{name}` | {kind} | {default} | {_cell(what)} |")
    first = (model.__doc__ or "").strip().splitlines()[0]
    title = f"`{place}`{f', name {named}' if named else ''}" if place else "The recipe itself"
    yield f"### {title}\n\n{first}\n"
    if rows:
        yield "\n".join(["| field | what it takes | default | meaning |", "|---|---|---|---|", *rows, ""])
    variants = {} if named else variants_of(model)
    for variant in dict.fromkeys(variants.values()):
        names = [name for name, other in variants.items() if other is variant and name in registry.BUILT_IN["methods"]]
        if names:
            yield from _groups(variant, place, shown, ", ".join(names), model.model_fields)
    for inner, path in inside:
        yield from _groups(inner, path, shown)


def _kind(annotation: Any, info: FieldInfo | None = None) -> str:
    """The type of a field, in words."""
    origin, inside = get_origin(annotation), get_args(annotation)
    registered = next((m for m in (info.metadata if info else ()) if isinstance(m, FromRegistry)), None)
    if registered is not None:
        return ", ".join(f"`{name}`" for name in registry.BUILT_IN[registered.kind]) + ", or another that is registered"
    limits = _limits(info.metadata) if info is not None else ""
    if origin is Annotated:
        return _kind(inside[0]) + _limits(inside[1:])
    if origin in (Union, types.UnionType):
        known = [_kind(part) + limits for part in inside if part is not type(None)]
        return ", ".join([*known, *(["null"] if type(None) in inside else [])])
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in inside)
    if origin is tuple:
        return f"list of {_kind(inside[0])}" if Ellipsis in inside else f"list of {len(inside)}: {_kind(inside[0])}"
    if origin is dict or annotation is dict:
        return "group of fields"
    return WORDS.get(annotation, "text") + limits


def _limits(metadata: Any) -> str:
    """The bounds of a number in words, with a leading space."""
    found = []
    for constraint in metadata:
        for name, words in BOUNDS.items():
            bound = getattr(constraint, name, None)
            if bound is not None:
                found.append(words.format(bound))
        found += [text for inner in getattr(constraint, "metadata", ()) if (text := _limits([inner]).strip())]
    return f" {' '.join(found)}" if found else ""


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    if info.default_factory is not None:
        return "as below"
    return f"`{json.dumps(info.default, ensure_ascii=False)}`" if info.default != "" else "empty"


def _cell(text: str | None) -> str:
    """A text as a cell of a Markdown table; angle brackets would be read as HTML."""
    return (text or "").replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    print(page(), end="")
