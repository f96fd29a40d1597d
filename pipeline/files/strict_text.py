"""Strict reading of YAML and JSON that people write: duplicate keys and keys that are not text are errors.

PyYAML and the json module silently keep only the last value of a duplicate key.
"""

from __future__ import annotations

import contextlib
import json
from typing import Any

import yaml

from pipeline.errors import UserError

MERGE = "tag:yaml.org,2002:merge"
NULL = "tag:yaml.org,2002:null"
TEXT = "tag:yaml.org,2002:str"


def load_yaml(text: str) -> Any:
    """Return the content of a YAML text.

    Raises yaml.YAMLError for what is not YAML, and UserError for a duplicate key and for a key that is not text. The
    sentence of the UserError has neither the file's name nor a full stop; the caller adds both.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        # Before the values are constructed: PyYAML then copies the keys that `<<` merges into their mapping, where they
        # would look like duplicates of the keys that override them.
        _require_keys(node)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _require_keys(root: yaml.Node) -> None:
    """Raise UserError unless every mapping has text keys, each once."""
    waiting, known = [root], {id(root)}
    twice: dict[str, list[int]] = {}
    while waiting:
        node = waiting.pop()
        inside: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            inside = node.value
        elif isinstance(node, yaml.MappingNode):
            inside = [value for _, value in node.value]
            seen: dict[str, list[int]] = {}
            for key, _ in node.value:
                if key.tag == MERGE:
                    continue  # `<<` may occur several times
                if not isinstance(key, yaml.ScalarNode) or (key.tag != TEXT and key.style is None):
                    raise UserError(f"line {key.start_mark.line + 1}: {_not_text(key)}")
                seen.setdefault(key.value, []).append(key.start_mark.line + 1)
            twice |= {name: lines for name, lines in seen.items() if len(lines) > 1}
        waiting += [found for found in inside if id(found) not in known]
        known |= set(map(id, inside))
    if twice:
        listed = ", ".join(f"'{name}' stands in {_lines(lines)}" for name, lines in sorted(twice.items()))
        raise UserError(f"{listed}; expected every key once in its group, as only the last counts: merge them")


def load_json(text: str) -> Any:
    """Return the content of a JSON text; ValueError for what is not JSON, UserError as `load_yaml` does."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            with contextlib.suppress(yaml.YAMLError):
                load_yaml(text)  # JSON is YAML, and YAML's parser knows the lines
            raise UserError(f"'{twice[0]}' stands there more than once; expected every key once: merge them")
        return dict(pairs)

    return json.loads(text, object_pairs_hook=once)


def plain_words(text: str) -> list[str]:
    """The unquoted scalars of a YAML list (or the one scalar) that YAML 1.1 does not read as text.

    They are returned as they were written: `Yes`, not True.
    """
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    if node is None or node.tag == NULL:
        return []  # an empty value
    items = node.value if isinstance(node, yaml.SequenceNode) else [node]
    return [
        item.value for item in items if isinstance(item, yaml.ScalarNode) and item.style is None and item.tag != TEXT
    ]


def quoting(words: list[str]) -> str:
    """Part of a sentence that asks to quote words which YAML reads as numbers, dates or booleans."""
    shown = ", ".join(f'"{word}"' for word in words)
    names = "name" if len(words) == 1 else "names"
    return f"YAML does not take {', '.join(words)} for text without quotes; quote the {names}: {shown}"


def _not_text(key: yaml.Node) -> str:
    """Part of a sentence on a key that is not text."""
    if isinstance(key, yaml.ScalarNode):
        return f"the key {key.value} is no text ({quoting([key.value])})"
    return "a list or group stands where a key is expected"


def _lines(lines: list[int]) -> str:
    if len(set(lines)) == 1:
        return f"line {lines[0]}, {len(lines)} times"
    return f"lines {', '.join(map(str, lines[:-1]))} and {lines[-1]}"
