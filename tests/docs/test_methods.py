"""The page of methods says of each what its declaration says, and names switches that it has."""

from __future__ import annotations

import re

import pytest

from pipeline.config import registry
from pipeline.config.method import method_options, options_of
from pipeline.config.paths import PROJECT
from pipeline.methods import make_method

PAGE = (PROJECT / "docs" / "methods.md").read_text("utf-8")
ROWS = {
    cells[0].strip("` "): [cell.strip() for cell in cells[1:]]
    for line in PAGE.partition("## What each method is")[2].partition("## Published")[0].splitlines()
    if line.startswith("| `") and len(cells := line.strip("|").split("|")) == 5
}
NOTES = re.findall(r"^\*\*((?:`\w+`(?:, )?)+)\.\*\* (.*?)(?=\n\n)", PAGE, re.DOTALL | re.MULTILINE)


def test_every_method_has_a_row_and_every_published_one_a_paragraph() -> None:
    assert set(ROWS) == set(registry.BUILT_IN["methods"])
    noted = {name for names, _ in NOTES for name in re.findall(r"`(\w+)`", names)}
    references = {"sequential", "independent", "joint", "zero_shot", "task_lora", "lora_merged", "modular"}
    assert noted == set(ROWS) - references


@pytest.mark.parametrize("name", list(ROWS))
def test_a_row_says_what_a_stage_changes(name: str) -> None:
    said = ROWS[name][-1]
    if said != "-":
        assert said == make_method(method_options(name=name)).changes_earlier


@pytest.mark.parametrize(("names", "text"), NOTES, ids=[names for names, _ in NOTES])
def test_a_switch_is_one_of_its_method(names: str, text: str) -> None:
    methods = re.findall(r"`(\w+)`", names)
    for field, value in re.findall(r"`(\w+): ([\w.]+)`", text):
        having = [name for name in methods if field in options_of(name).model_fields]
        assert having, f"{methods} have no {field}"
        given = {"true": True, "false": False}.get(value, float(value) if value.replace(".", "").isdigit() else value)
        method_options(name=having[0], **{field: given})
