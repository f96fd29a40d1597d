"""Expand `~` and `$VARIABLES` in paths from recipes and options, as a shell does.

A shell replaces `~` only at the start of a word, so neither in `--root=~/own` nor in a recipe.
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

from pipeline.errors import UserError

FILE_URI = re.compile(r"((?:sqlite|file):/*|)(~.*)", re.DOTALL)
UNKNOWN_HOME = "begins with the home folder of a user that this machine does not know; write the path out."
RUNS = Path("runs")  # where recipes put runs unless they say otherwise
VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


def expanded(path: str) -> str:
    """Return a path with a leading `~` or `~user` and every `$NAME` or `${NAME}` replaced; other text is kept.

    Raises UserError for an unknown user, for an unset variable, and for a path such as `~/own` that exists literally
    in the working folder. Earlier versions made such folders, so it is ambiguous which of the two is meant.
    """
    found = os.path.expanduser(path)
    if found != path and os.path.lexists(path):
        raise UserError(f"'{path}' {_literally(path, found)}")
    if found.startswith("~"):
        raise UserError(f"'{path}' {UNKNOWN_HOME}")
    if "$" not in found or os.path.lexists(found):  # an existing file may have a $ in its name
        return found
    unset = [name for match in VARIABLE.findall(found) for name in match if name and name not in os.environ]
    if unset:
        raise UserError(f"'{path}' names the variable {unset[0]}, which is not set; set it, or write the path out.")
    return os.path.expandvars(found)


def expanded_uri(uri: str) -> str:
    """Return a tracking URI with the `~` of its path replaced; a `$` is kept, as it may belong to a password."""
    match = FILE_URI.match(uri)
    return match[1] + expanded(match[2]) if match is not None else uri


def _literally(path: str, found: str) -> str:
    return (
        f"is a folder here, literally of that name (earlier versions made such), and means '{found}'; write '{found}', "
        f"or './{path}' for the one that is here."
    )


def command(verb: str, *arguments: str | Path) -> str:
    """Return a command that can be pasted into a shell, with its arguments quoted where they need it."""
    return f"python -m pipeline {verb} {shlex.join(map(str, arguments))}".rstrip()
