"""Every command that the documentation shows is one that the command line takes, every file it links to is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from pipeline.cli.commands import app
from pipeline.config.paths import PROJECT

PAGES = sorted([PROJECT / "README.md", *(PROJECT / "docs").glob("*.md")])
TUTORIALS = [page for page in PAGES if page.name.startswith("tutorial_")]  # test_tutorials.py executes them
COMMAND = re.compile(r"python -m pipeline +([^`\n]*)")


def commands(page: Path) -> list[str]:
    found = []
    for text in COMMAND.findall(page.read_text(encoding="utf-8")):
        text = text.partition("  #")[0].strip().rstrip(".,;:)")
        text = text[:-1] if text.endswith('"') and text.count('"') % 2 else text  # the whole is quoted, as for --wrap
        if text and not text.endswith("..."):
            found.append(text)
    return found


SHOWN = sorted({command for page in PAGES for command in commands(page)})


def test_the_readme_shows_every_verb_that_a_user_needs() -> None:
    shown = " ".join(commands(PROJECT / "README.md"))
    for verb in ("check", "prepare", "run", "report", "predict", "export", "serve", "new-task", "add", "ls"):
        assert f"{verb} " in f"{shown} ", verb


@pytest.mark.parametrize("command", SHOWN)
def test_a_shown_command_is_one_that_the_command_line_takes(command: str) -> None:
    verb, *arguments = shlex.split(command)
    group: Any = typer.main.get_command(app)
    assert verb in group.commands, f"there is no verb {verb}"
    arguments = [argument for argument in arguments if argument not in ("...", "\\")]
    if verb in ("run", "check", "prepare", "train") and not arguments:
        return  # a verb that is only named
    try:
        group.commands[verb].make_context(verb, arguments, resilient_parsing=not arguments)
    except Exception as error:
        pytest.fail(f"python -m pipeline {command}: {error}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_that_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target
