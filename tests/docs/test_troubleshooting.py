"""Each message that the page of troubleshooting quotes is one of the sources, so a changed message fails here."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache

import pytest

from tests.packaging.test_imports import SOURCES
from tests.processes import PROJECT

PAGE = (PROJECT / "docs" / "troubleshooting.md").read_text("utf-8")
QUOTED = [
    (title, " ".join(message.split()))
    for title, message in re.findall(r"^### (.+?)\n\n```text\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
]
# What stands for a value: `<path>` on the page, `{path}` of an f-string, `%s` of a log line.
VALUE = "\0"
FEWEST_FIXED = 15  # characters of a quotation that are the message's own


def with_values_marked(text: str) -> str:
    """The text with one sign for each value, or for several without text between them, and single blanks."""
    text = re.sub(r"<[^<>]+>|%[sd]|%\.\df", VALUE, text)
    return re.sub(rf"{VALUE}+", VALUE, " ".join(text.split()))


def written(node: ast.AST) -> str | None:
    """The text of a string literal or an f-string, with VALUE for what is filled in; None for other nodes."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else VALUE for part in node.values)
    return None


def strings(tree: ast.AST) -> Iterator[str]:
    """The strings that a module may print: all but docstrings and the parts of f-strings."""
    for child in ast.iter_child_nodes(tree):
        text = None if isinstance(tree, ast.Expr) else written(child)
        if text is not None:
            yield text
        if not isinstance(child, ast.JoinedStr):
            yield from strings(child)
        else:
            yield from (
                text for value in child.values if isinstance(value, ast.FormattedValue) for text in strings(value)
            )


@cache
def messages() -> str:
    """Every such string of the sources, one a line."""
    texts = (text for path in SOURCES for text in strings(ast.parse(path.read_text("utf-8"))))
    return "\n".join(sorted({with_values_marked(text) for text in texts if text and " " in text}))


def is_said(message: str) -> bool:
    """Whether the message, with its values left open, stands in one string of the sources."""
    # A quoted value of the page, '<path>', may be one that the code writes with {path!r}.
    marked = with_values_marked(message)
    return any(form in messages() for form in (marked, marked.replace(f"'{VALUE}'", VALUE)))


def test_the_page_has_enough_messages_each_once() -> None:
    assert len(QUOTED) >= 25
    assert len({message for _, message in QUOTED}) == len({title for title, _ in QUOTED}) == len(QUOTED)
    assert len(QUOTED) == PAGE.count("\n### "), "every entry begins with its message"


@pytest.mark.parametrize(("title", "message"), QUOTED, ids=[title for title, _ in QUOTED])
def test_a_quoted_message_is_in_the_sources(title: str, message: str) -> None:
    assert len(with_values_marked(message).replace(VALUE, "")) >= FEWEST_FIXED, "too short to be told from others"
    assert is_said(message), f"no message of the sources reads like this by now: {message}"


@pytest.mark.parametrize(("title", "message"), QUOTED, ids=[title for title, _ in QUOTED])
def test_a_message_that_changes_in_one_word_is_not_found(title: str, message: str) -> None:
    words = message.split()
    longest = max((word for word in words if not re.search(r"[<>]", word)), key=len)
    assert not is_said(message.replace(longest, "otherwise", 1))


def test_a_message_that_nobody_writes_is_not_found() -> None:
    assert is_said("'<path>' names the variable <name>, which is not set")
    assert not is_said("'<path>' names the variable <name>, which nobody set")
    assert not is_said("'<path>' <more> names the variable")  # a value where the message has none


def test_every_entry_has_a_cause_and_a_cure() -> None:
    for entry in PAGE.split("\n### ")[1:]:
        assert entry.count("**Cause.**") == entry.count("**Cure.**") == 1, entry.splitlines()[0]
