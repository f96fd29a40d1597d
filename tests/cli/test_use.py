"""Listing runs and chatting."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import Mock

import pytest
from typer.testing import CliRunner

from pipeline.adapter.chat import chat
from pipeline.adapter.load import load_adapter
from pipeline.cli.commands import app
from pipeline.config.load import load_recipe
from pipeline.errors import EXIT_OK, EXIT_USER
from pipeline.sequence.add_task import Addition
from tests.adapters import question, save_adapter, save_models
from tests.report.test_report import make_run


def test_runs_are_listed_with_their_key_figures_and_damaged_ones_named(tmp_path: Path) -> None:
    make_run(tmp_path / "first", status="done", updated="2026-01-01T10:00:00+00:00", stage=3)
    make_run(tmp_path / "second", stages=0, updated="2026-01-02T10:00:00+00:00")
    (make_run(tmp_path / "third") / "matrix.json").write_text("{")
    (tmp_path / "no-run").mkdir()
    done = CliRunner().invoke(app, ["ls", str(tmp_path), "--json"], env={"COLUMNS": "160"})
    assert done.exit_code == EXIT_OK, done.stderr
    rows = {row["run"]: row for row in json.loads(done.stdout.splitlines()[-1])["runs"]}
    assert list(rows) == ["third", "first", "second"]
    assert (rows["first"]["last"], rows["first"]["stages"], rows["first"]["routing"]) == (81.0, "3/3", 98.0)
    assert rows["second"]["last"] is None
    assert "is not JSON" in rows["third"]["note"] and "is not JSON" in done.stdout


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("matrix.json", {"tasks": ["a"], "accuracy": 5}),
        ("matrix.json", {"tasks": ["a", "b"], "accuracy": [["x", None], [1.0, 2.0]]}),
        ("matrix.json", {"tasks": ["a"], "accuracy": [[1.0]], "routing": [1.0]}),
        ("config.yaml", {"data": 3}),
        ("config.yaml", {"kind": "clip"}),
        ("run.json", {"stages": [1]}),
    ],
)
def test_a_run_with_a_file_that_holds_something_else_is_listed_as_damaged(
    tmp_path: Path, file: str, content: object
) -> None:
    make_run(tmp_path / "whole")
    (make_run(tmp_path / "broken", units=3) / file).write_text(json.dumps(content))
    done = CliRunner().invoke(app, ["ls", str(tmp_path), "--json"])
    assert done.exit_code == EXIT_OK, done.stderr
    rows = {row["run"]: row for row in json.loads(done.stdout.splitlines()[-1])["runs"]}
    assert rows["broken"]["status"] == "damaged" and "found" in rows["broken"]["note"]
    assert rows["whole"]["status"] != "damaged"


def test_the_list_fits_a_terminal(tmp_path: Path) -> None:
    make_run(tmp_path / "nano-modalprompt-s0", status="done", updated="2026-01-01T10:00:00+00:00", stage=3)
    done = CliRunner().invoke(app, ["ls", str(tmp_path)], env={"COLUMNS": "80"})
    (line,) = (line for line in done.stdout.splitlines() if "nano-modalprompt-s0" in line)
    assert line.split() == ["nano-modalprompt-s0", "modalprompt", "done", "3/3", "81.0", "13.5", "98.0", "2026-01-01"]


def test_a_folder_that_is_missing_is_said(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["ls", str(tmp_path / "runs")])
    assert done.exit_code == EXIT_USER and "is not a folder" in done.stderr


def test_a_fresh_clone_is_told_how_its_first_run_comes_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # without the folder, and with an empty one
        done = CliRunner().invoke(app, ["ls"])
        assert done.exit_code == EXIT_OK, done.stderr
        assert done.stdout.startswith("There is no run in runs yet. `python -m pipeline prepare nano` and then")
        told = CliRunner().invoke(app, ["ls", "--json"])
        assert json.loads(told.stdout.splitlines()[-1]) == {"runs": []}
        Path("runs").mkdir(exist_ok=True)


def test_a_chat_goes_on_after_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = load_adapter(save_adapter(tmp_path / "adapter", save_models(tmp_path)))
    picture = tmp_path / "red.png"
    picture.write_bytes(question(0).image or b"")
    (tmp_path / "text.png").write_text("no image")
    lines = iter(
        [
            question(0).text,
            f"/image {picture}",
            question(0).text,
            f"/image {tmp_path / 'text.png'}",
            "/task T7",
            "/help",
            "",
            question(0).text,
        ]
    )
    prompts, shown = list[str](), list[str]()

    def read(prompt: str) -> str:
        prompts.append(prompt)
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    assert chat(adapter, None, read, shown.append) == 3
    assert prompts[0] == "[no image] > " and prompts[-1] == "[red.png] > "
    answers = [line for line in shown if "sets: T0" in line]
    assert answers[-1] == answers[-2]  # still about the picture
    errors = [line for line in shown if line.startswith("error:")]
    assert "is not a readable image" in errors[0] and "unknown task 'T7'" in errors[1]


def test_a_picture_in_the_home_folder_is_found_while_chatting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "red.png").write_bytes(question(0).image or b"")
    lines, shown, prompts = iter(["/image ~/red.png", "/quit"]), list[str](), list[str]()

    def read(prompt: str) -> str:
        prompts.append(prompt)
        return next(lines)

    chat(Mock(), None, read, shown.append)
    assert prompts[-1] == "[red.png] > " and not any("error" in line for line in shown)


@pytest.mark.parametrize("name", ["2024", "x #1", "on", "a: b", "{name}", "Größe"])
def test_a_task_is_added_to_the_folder_that_was_named_whatever_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("nano")
    recipe.dump_yaml(Path(name) / "config.yaml")
    addition = Addition(Path(name), recipe, "Mine", is_new=False)
    monkeypatch.setattr("pipeline.sequence.add_task.prepare_addition", lambda *_: addition)
    trained: list[Path] = []
    monkeypatch.setattr(
        "pipeline.cli.sequence.start",
        lambda verb, recipe, overrides, *_: trained.append(load_recipe(recipe, overrides).run_path),
    )
    done = CliRunner().invoke(app, ["add", name, "Mine"])
    assert done.exit_code == EXIT_OK, done.output
    assert trained == [Path(name)]


def test_piped_questions_get_no_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.adapter.load.load_adapter", lambda *_, **__: None)
    monkeypatch.setattr(
        "pipeline.adapter.chat.chat", lambda answerer, image, read, write: write(f"asked {read('[x] > ')}")
    )
    done = CliRunner().invoke(app, ["chat", str(tmp_path)], input="why?\n")
    assert done.stdout == "asked why?\n", done.output
