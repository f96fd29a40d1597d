"""What all verbs share: help, paths, errors as JSON, and the last words of a run."""

from __future__ import annotations

import errno
import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from typer.testing import CliRunner

from pipeline import __version__
from pipeline.cli.commands import app
from pipeline.config.load import load_recipe
from pipeline.errors import EXIT_FAILURE, EXIT_OK, EXIT_RESUMABLE, EXIT_USER, Interrupted, UserError
from pipeline.report.listing import narrow, runs_table
from pipeline.report.summary import matrix_table, show_end
from pipeline.runs.claim import claim_run
from pipeline.runs.folder import read_run
from tests.report.test_report import make_run

VERBS = [command.name or command.callback.__name__ for command in app.registered_commands]  # type: ignore[union-attr]
OF_A_FOLDER = [
    "evaluate RUN",
    "predict RUN --question q",
    "report RUN",
    "export RUN adapter",
    "serve RUN",
    "chat RUN",
    "merge RUN --into x",
    "prune RUN Count --into x",
    "add RUN Mine",
]


@pytest.fixture
def without_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.ranks.slurm.has_slurm", lambda env: False)


def run(*arguments: str, **environment: str):
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "100", **environment})


def last_object(output: str) -> dict[str, object]:
    return json.loads(output.splitlines()[-1])


def test_the_version_is_shown() -> None:
    done = run("--version")
    assert (done.exit_code, done.stdout) == (EXIT_OK, f"pipeline {__version__}\n")


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_the_help_names_no_type_where_none_is_wanted(verb: str) -> None:
    text = run(*filter(None, [verb, "--help"])).stdout
    assert "<bool>" not in text and "<path>  Folder" not in text and "list[" not in text and "{" not in text


def test_the_verbs_stand_in_groups_in_the_order_of_their_use() -> None:
    text = run("--help").stdout
    titles = [
        "Train a recipe",
        "check",
        "prepare",
        "run",
        "evaluate",
        "Look at runs",
        "report",
        "Use what was learned",
        "predict",
        "Adapters",
        "export",
        "A task of your own",
        "new-task",
    ]
    places = [found.start() for title in titles if (found := re.search(rf"^\W*{title}\b", text, re.MULTILINE))]
    assert len(places) == len(titles)
    assert places == sorted(places)


@pytest.mark.parametrize("option", ["--licence", "--license"])
def test_the_licence_is_given_in_either_spelling(option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str | None] = []

    def export(run: Path, target: Path, licence: str | None) -> dict[str, str]:
        given.append(licence)
        return {}

    monkeypatch.setattr("pipeline.adapter.from_run.export", export)
    assert run("export", str(tmp_path), str(tmp_path / "adapter"), option, "cc-by-4.0").exit_code == EXIT_OK
    assert given == ["cc-by-4.0"]


def test_a_wrong_input_is_one_object_beside_its_sentence() -> None:
    done = run("run", "nanno", "--json")
    told = last_object(done.stdout)
    assert (done.exit_code, told["exit_code"]) == (EXIT_USER, EXIT_USER)
    assert done.stderr == f"error: {told['error']}\n" and "Did you mean 'nano'?" in str(told["error"])


def test_a_usage_error_is_one_object() -> None:
    done = run("run", "nano", "--json", "--sed", "1")
    assert last_object(done.stdout)["exit_code"] == done.exit_code == EXIT_USER and "--sed" in done.stderr


@pytest.mark.parametrize(
    ("error", "code"), [(Interrupted("stopped after stage 2."), EXIT_RESUMABLE), (ZeroDivisionError("x"), EXIT_FAILURE)]
)
def test_a_stop_and_a_bug_are_one_object(monkeypatch: pytest.MonkeyPatch, error: Exception, code: int) -> None:
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr("pipeline.config.load.load_recipe", broken)
    done = run("run", "nano", "--json")
    assert last_object(done.stdout)["exit_code"] == done.exit_code == code


def test_a_check_with_problems_keeps_its_findings_beside_the_error(tmp_path: Path) -> None:
    done = run("check", "nano", "--set", f"data.prepared={tmp_path}", "--set", "train.deepspeed=no.json", "--json")
    told = last_object(done.stdout)
    assert done.exit_code == told["exit_code"] == EXIT_USER and told["ok"] is False and "recipe" in told
    assert "no.json" in str(told["error"]) and "no.json" in done.stderr


@pytest.mark.parametrize("call", OF_A_FOLDER)
def test_a_file_of_a_run_in_place_of_its_folder_is_said_with_the_folder(tmp_path: Path, call: str) -> None:
    make_run(tmp_path / "first")
    done = run(*(str(tmp_path / "first" / "config.yaml") if word == "RUN" else word for word in call.split()))
    assert done.exit_code == EXIT_USER
    assert f"is a file; expected the folder of a run or an adapter, here '{tmp_path / 'first'}'" in done.stderr


@pytest.mark.parametrize("call", OF_A_FOLDER)
def test_a_recipe_in_place_of_a_run_is_said_with_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(Path("runs/nano-modalprompt-s0"))
    done = run(*call.replace("RUN", "nano").split())
    assert done.exit_code == EXIT_USER
    assert "'nano' is a recipe, not a folder" in done.stderr and "'runs/nano-modalprompt-s0'" in done.stderr


@pytest.mark.parametrize("verb", ["check", "prepare", "run", "train"])
def test_a_run_in_place_of_a_recipe_is_said_with_its_recipe(tmp_path: Path, verb: str) -> None:
    make_run(tmp_path / "first")
    done = run(verb, str(tmp_path / "first"))
    assert done.exit_code == EXIT_USER and f"'{tmp_path / 'first' / 'config.yaml'}'" in done.stderr


def test_a_run_in_place_of_the_folder_of_runs_is_said(tmp_path: Path) -> None:
    done = run("ls", str(make_run(tmp_path / "first")))
    assert done.exit_code == EXIT_USER and f"here '{tmp_path}'" in done.stderr


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


@pytest.mark.parametrize("call", ["ls ~/runs", "ls $HOME/runs", "report ~/runs/a ~/runs/b"])
def test_a_path_on_the_command_line_may_begin_at_home(home: Path, call: str) -> None:
    for name in "ab":
        make_run(home / "runs" / name)
    done = run(*call.split())
    assert done.exit_code == EXIT_OK, done.stderr
    assert not list(Path().iterdir())


def made_task(*options: str) -> tuple[str, list[str]]:
    """The output of `new-task Mine`, and the words of its line `next:`."""
    Path("t.jsonl").write_text("".join(f'{{"question": "q{n}", "answer": "{n % 2}"}}\n' for n in range(10)))
    done = run("new-task", "Mine", "--images", ".", "--samples", "t.jsonl", *options)
    assert done.exit_code == EXIT_OK, done.output
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("next: "))
    return done.stdout, shlex.split(line.removeprefix("next: python -m pipeline "))


@pytest.mark.usefixtures("without_slurm")
def test_a_task_is_made_at_home_and_the_next_command_survives_a_shell(home: Path) -> None:
    make_run(Path("runs") / "one", status="done", stage=3)
    _, words = made_task("--root=~/my own")
    assert (home / "my own" / "instructions" / "Mine" / "train.json").is_file() and not Path("~").exists()
    assert words == ["add", "runs/one", "Mine", "--root", str(home / "my own")]


@pytest.mark.usefixtures("without_slurm")
def test_a_task_where_no_run_is_finished_is_followed_by_a_command_that_begins_one(home: Path) -> None:
    make_run(Path("runs") / "begun", status="running", stage=1)
    said, words = made_task("--root=~/my own")
    assert "There is no finished run in runs that the task could be added to." in said
    assert words[:2] == ["run", "smolvlm_256m_own"] and words[2::2] == ["--set"] * 2
    recipe = load_recipe(words[1], words[3::2])
    assert (recipe.data.root, [task.name for task in recipe.data.tasks]) == (str(home / "my own"), ["Mine"])


@pytest.mark.usefixtures("without_slurm")
@pytest.mark.parametrize(("model", "said"), [([], True), (["model.path=some/model"], False)])
def test_a_task_for_a_run_of_the_demo_is_told_which_pictures_its_model_knows(
    home: Path, model: list[str], said: bool
) -> None:
    path = make_run(Path("runs") / "one", status="done", stage=3)
    load_recipe("nano", model).dump_yaml(path / "config.yaml")
    shown, words = made_task()
    assert words[:2] == ["add", "runs/one"]
    assert (
        "The model of runs/one is the demo's" in shown and "`python -m pipeline run smolvlm_256m_own" in shown
    ) is said


@pytest.mark.usefixtures("without_slurm")
def test_a_task_where_several_runs_are_finished_leaves_the_choice(home: Path) -> None:
    for name in "ab":
        make_run(Path("runs") / name, status="done", stage=3)
    said, words = made_task()
    assert words == ["add", "RUN", "Mine", "--root", "data/own"] and "no finished run" not in said


def test_an_unknown_home_is_said(home: Path) -> None:
    done = run("ls", "~nobody-here/runs")
    assert done.exit_code == EXIT_USER and "home folder of a user" in done.stderr


def test_runs_of_different_kinds_are_not_put_into_one_table(tmp_path: Path) -> None:
    make_run(tmp_path / "sequence")
    (tmp_path / "benchmark").mkdir()
    (tmp_path / "benchmark" / "config.yaml").write_text(yaml.safe_dump({"kind": "clip"}))
    for pair in (("sequence", "benchmark"), ("benchmark", "sequence")):
        done = run("report", *(str(tmp_path / name) for name in pair))
        assert done.exit_code == EXIT_USER and done.stdout == ""
        assert "different kinds" in done.stderr and "evaluate" not in done.stderr
    assert not list(tmp_path.glob("*/report.html"))


def test_the_report_as_json_has_the_table(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "first", seed=1), make_run(tmp_path / "second", stages=2)]
    told = json.loads(run("report", *map(str, runs), "--json").stdout.splitlines()[-1])
    assert told["report"] == str(runs[0] / "report.html")
    (verdict,) = told["verdict"]
    assert verdict.endswith("each scores above the frozen model.")
    assert verdict in (runs[0] / "report.html").read_text("utf-8")
    rows = {row["name"]: row for row in told["rows"]}
    assert rows["first"]["values"] == dict(zip(told["columns"], [60.0, 88.0, 95.0, 81.0, 13.5, 98.0], strict=True))
    assert rows["second"]["note"] == "2 of 3 stages" and told["metrics"]["first"]["last"] == 81.0


@pytest.mark.usefixtures("without_slurm")
def test_a_run_ends_with_its_matrix_its_report_and_the_next_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    path = make_run(tmp_path / "my run", status="done", stage=3)
    (path / "report.html").touch()
    show_end(path, "run", "nano", ["count was not learned."])
    *table, figures, wrong, report, then = capsys.readouterr().out.splitlines()
    assert wrong == "count was not learned."
    rows = {line.split("  ")[0].strip(): line.split()[2:] for line in table}
    assert rows["after boxes"] == ["60.0", "88.0", "95.0"] and rows["after count"] == ["80.0", "85.0", "–"]
    assert figures == "percent; last 81.0, forgetting 13.5, routing 98.0"
    assert report == f"report: {path / 'report.html'}"
    assert then == f"next: python -m pipeline predict '{path}' --image FILE --question TEXT"


@pytest.mark.parametrize(
    ("verb", "stages", "then"),
    [("train", 3, "evaluate RUN"), ("run", 2, "run nano"), ("evaluate", 2, "run RUN/config.yaml")],
)
@pytest.mark.usefixtures("without_slurm")
def test_what_comes_next_follows_from_what_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str, stages: int, then: str
) -> None:
    path = make_run(tmp_path / "run", stages=stages)
    show_end(path, verb, "nano")
    command = then.replace("RUN", str(path))
    assert capsys.readouterr().out.splitlines()[-1] == f"next: python -m pipeline {command}"


def test_on_a_cluster_what_comes_next_is_a_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sbatch").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    path = make_run(tmp_path / "run", stages=3)
    show_end(path, "train", "nano")
    assert capsys.readouterr().out.endswith(f"next: sbatch OPTIONS slurm/run_sequence.sh --evaluate {path}\n")


def test_a_long_name_is_broken_behind_its_parts() -> None:
    assert narrow("nano-modalprompt-s0").split("\n") == ["nano-", "modalprompt-s0"]
    assert narrow("short-name") == "short-name"
    assert narrow("averyveryverylongwordalone") == "averyveryverylongwordalone"


def test_names_in_tables_are_not_broken_inside_a_word(tmp_path: Path) -> None:
    from rich.console import Console

    name = "first_steps-modalprompt-s0-with-a-long-name"
    row = {"run": name, "method": "modalprompt", "status": "done", "stages": "3/3", "updated": "2026-01-01 10:00"}
    console = Console(width=80, record=True)
    console.print(runs_table([row]))
    shown = [line.split()[0] for line in console.export_text().splitlines() if line.strip()]
    assert shown[2:-1] == ["first_steps-", "modalprompt-s0-with-", "a-long-name"]


def test_the_matrix_of_many_tasks_fits_a_terminal(tmp_path: Path) -> None:
    from rich.console import Console

    console = Console(width=50, record=True)
    console.print(matrix_table(read_run(make_run(tmp_path / "run"))))
    text = console.export_text()
    assert all(number in text for number in ("60.0", "88.0", "95.0"))


def test_a_recipe_at_home_is_found_by_every_verb(home: Path) -> None:
    home.mkdir()
    (home / "mine.yaml").write_text("extends: nano\nseed: no-number\n")
    assert "seed: found 'no-number'" in run("check", "~/mine.yaml").stderr
    with pytest.raises(UserError, match="no-number"):
        load_recipe("~/mine.yaml")


@pytest.mark.parametrize("verb", ["run", "evaluate"])
def test_the_verbs_that_score_a_run_show_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    path = make_run(tmp_path / "run", status="done", stage=3)
    for work in (
        "pipeline.cli.sequence.on_ranks",
        "pipeline.sequence.prepared.require_prepared",
        "pipeline.runs.claim.claim_run",
    ):
        monkeypatch.setattr(work, lambda *_: None)
    read = SimpleNamespace(load_recipe=load_recipe, load_run=lambda *_: None)
    monkeypatch.setattr("pipeline.cli.sequence.recipes", read)
    arguments = ["nano", "--set", f"run_dir={path}"] if verb == "run" else [str(path)]
    assert "after boxes" in run(verb, *arguments).stdout
    assert run(verb, *arguments, "--json").stdout == ""  # the result alone, which the work has shown


def test_a_run_folder_that_is_taken_is_said_with_a_free_one(tmp_path: Path) -> None:
    taken = [f"run_dir={tmp_path / 'a run'}"]
    claim_run(load_recipe("nano", taken))
    (tmp_path / "a run-2").mkdir()
    with pytest.raises(UserError) as caught:
        claim_run(load_recipe("nano", [*taken, "data.tasks=[Count, Digits]"]))
    assert f"`--set 'run_dir={tmp_path}/a run-3'`" in str(caught.value)
    assert "Count, Digits now" in str(caught.value)


def test_a_model_that_cannot_be_had_is_missed_before_data_is_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared: list[object] = []
    monkeypatch.setattr("data_prep.prepare.prepare", lambda *given, **_: prepared.append(given))
    missing = [f"run_dir={tmp_path / 'run'}", "data.prepare_first=true", "model.path=nobody/nothing"]
    done = run("run", "nano", *(word for text in missing for word in ("--set", text)))
    assert done.exit_code == EXIT_USER and "model.path is 'nobody/nothing', which is neither a folder" in done.stderr
    assert not prepared


def test_a_run_goes_on_whether_or_not_it_prepares_its_data_itself(tmp_path: Path) -> None:
    taken = [f"run_dir={tmp_path / 'run'}"]
    run_path = claim_run(load_recipe("nano", taken))
    (run_path / "run.json").write_text("{}")  # begun
    assert claim_run(load_recipe("nano", [*taken, "data.prepare_first=true"])) == run_path


def test_a_run_folder_in_which_config_yaml_was_only_begun_is_still_free(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml.elsewhere.1.0.tmp").write_text("name: na")  # its writer is at work, or was killed
    claim_run(load_recipe("nano", [f"run_dir={run_dir}"]))
    assert load_recipe(run_dir / "config.yaml").name == "nano"


def test_a_folder_of_somebody_else_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "train.lock"))

    monkeypatch.setattr("data_prep.prepare.prepare", refused)
    done = run("prepare", "nano")
    assert done.exit_code == EXIT_FAILURE and "Traceback" not in done.stderr
    assert f"'{tmp_path / 'train.lock'}' may not be read or written by this user (Permission denied)" in done.stderr
