"""Pages of runs: what was measured is there, what differs is named, and what cannot be shown is a sentence."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from pipeline.cli.commands import app
from pipeline.errors import EXIT_USER, UserError
from pipeline.files.lock import FileLock
from pipeline.runs.folder import read_run
from pipeline.ui.runs import names_of
from pipeline.ui.tables import comparable, confusion_rows, differing, tracked
from tests.compat.kept import KEPT
from tests.report.test_report import ATTACK, make_run
from tests.ui.made import Browser, other_process_holds, run_with_pictures


def cells(text: str, table: str) -> list[list[str]]:
    """The texts of a table's cells, row by row."""
    (found,) = re.findall(rf'<table[^>]*id="{table}".*?</table>', text, re.DOTALL)
    rows = re.findall(r"<tr.*?</tr>", found, re.DOTALL)
    written = [re.findall(r"<t[dh].*?</t[dh]>", row, re.DOTALL) for row in rows]
    return [[re.sub(r"<[^>]+>", "", cell).strip() for cell in row] for row in written]


def test_a_run_shows_its_numbers_matrix_curves_and_routing(browser: Browser) -> None:
    text = browser.page("/run/small-s3/")
    assert "All 3 tasks were learned" in text
    assert ["after boxes", "60.0", "88.0", "95.0"] in cells(text, "matrix")
    assert ["zero-shot", "1.0", "2.0", "3.0"] in cells(text, "matrix")
    stages = [f"after {task}" for task in ("colour", "count", "boxes")]
    assert [row[0] for row in cells(text, "matrix")[1:]] == ["zero-shot", *stages, "retention"], "as in the report"
    assert "<dt>prepared data</dt>" in text and "<dt>status</dt>" not in text
    assert re.search(r"<dt>last</dt><dd>81\.0</dd>", text)
    # Of the four samples of `boxes` one is routed to `colour`, and the number leads to it.
    assert ["boxes", "25.0", "0.0", "75.0"] in cells(text, "confusion")
    assert 'href="examples?task=boxes&amp;first=colour"' in text
    for figure in ("course", "forgetting", "losses"):
        drawn = browser.client.get(f"/run/small-s3/figure/{figure}.svg")
        assert drawn.headers["content-type"].startswith("image/svg+xml") and "<path" in drawn.text
    fault = browser.fault("/run/small-s3/figure/none.svg", 404)
    assert fault.startswith("there is no figure 'none'; expected one of: course")


def test_runs_stand_side_by_side_with_deviations_and_the_settings_that_differ(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"small-s{seed}") for seed in (0, 1)]
    for seed, run in enumerate(runs):
        config = yaml.safe_load((run / "config.yaml").read_text()) | {"seed": seed, "run_dir": str(run)}
        (run / "config.yaml").write_text(yaml.safe_dump(config))
    matrix = json.loads((runs[1] / "matrix.json").read_text())
    matrix["accuracy"][2][0] = 70.0
    (runs[1] / "matrix.json").write_text(json.dumps(matrix))
    text = Browser(*runs).page("/")
    assert "65.0 ± 7.1" in text and "over seeds 0, 1" in text
    assert cells(text, "settings") == [["setting", "small-s0", "small-s1"], ["seed", "0", "1"]]
    assert 'src="/course/0.svg"' in text


def test_runs_of_other_tasks_get_a_table_of_their_own(tmp_path: Path) -> None:
    run, other = make_run(tmp_path / "one"), make_run(tmp_path / "two")
    matrix = json.loads((other / "matrix.json").read_text()) | {"tasks": ["a", "b", "c"]}
    (other / "matrix.json").write_text(json.dumps(matrix))
    groups = comparable([read_run(path) for path in (run, other, run)])
    assert [[one.name for one in group] for group in groups] == [["one", "one"], ["two"]]
    browser = Browser(run, other)
    assert browser.page("/").count("comparison") == 2
    assert browser.client.get("/course/1.svg").status_code == 200
    assert browser.client.get("/course/2.svg").status_code == 404


def test_settings_differ_by_their_dotted_names() -> None:
    first = {"seed": 1, "run_dir": "x", "data": {"tasks": [{"name": "T"}]}}
    found = differing({"a": first, "b": {"seed": 1, "train": {"steps": 2}}})
    assert found == [("data.tasks", ["T", ""]), ("train.steps", ["", "2"])]


def test_text_of_a_run_is_never_markup(tmp_path: Path) -> None:
    browser = Browser(make_run(tmp_path / "a <b>&c", recipe=ATTACK))
    for page in ("", "examples", "chat", "add"):
        text = browser.page(f"/run/a%20%3Cb%3E&c/{page}")
        assert ATTACK not in text and "<b>" not in text
    assert "&lt;script&gt;" in browser.page("/run/a%20%3Cb%3E&c/")


def test_unfinished_damaged_and_clip_runs_have_a_sentence_each(tmp_path: Path) -> None:
    new, torn = make_run(tmp_path / "new", stages=0), make_run(tmp_path / "torn")
    (torn / "matrix.json").write_text('{"tasks": ["colour", "count')
    browser = Browser(new, torn, KEPT / "runs" / "benchmark")
    home = browser.page("/")
    assert "matrix.json is not JSON" in home and "6 of 7 units" in home
    assert "Nothing is scored yet" in browser.page("/run/new/")
    assert "There are no predictions yet" in browser.page("/run/new/examples")
    assert "No stage of this run is finished" in browser.page("/run/new/chat")
    assert "matrix.json is not JSON" in browser.fault("/run/torn/", 200)
    assert "matrix.json is not JSON" in browser.fault("/run/torn/examples", 422)
    assert cells(browser.page("/run/benchmark/"), "benchmark")[0][:2] == ["method", "dataset"]
    assert "are for task sequences" in browser.fault("/run/benchmark/chat", 422)
    assert browser.fault("/run/other/", 404) == "this page has no run 'other'; expected one of: new, torn, benchmark."
    assert "`python -m pipeline report" in browser.fault("/run/new/report", 404)
    assert "nothing at this address" in browser.fault("/nowhere", 404)


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (lambda path: path / "absent", "does not exist"),
        (lambda path: path, "is not a run: it has no run.json"),
        (lambda path: make_run(path / "runs" / "one").parent, "holds runs and is none itself; name them"),
        (lambda path: make_run(path / "one") / "run.json", "is a file"),
    ],
)
def test_what_is_no_run_ends_the_command_with_a_sentence(tmp_path: Path, made: object, expected: str) -> None:
    assert callable(made)
    result = CliRunner().invoke(app, ["ui", str(made(tmp_path))])
    assert result.exit_code == EXIT_USER
    assert expected in " ".join(result.output.split())


def test_runs_of_one_name_are_told_apart_and_one_run_is_shown_once(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run")
    assert names_of([first, second, first]) == {"run": first, "run-2": second}
    with pytest.raises(UserError, match="no run was named"):
        names_of([])


def test_a_report_is_shown_and_runs_no_script(browser: Browser, run: Path) -> None:
    (run / "report.html").write_text("<h1>report</h1>")
    reply = browser.client.get("/run/small-s3/report")
    assert reply.text == "<h1>report</h1>"
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src" not in policy and "sandbox" in policy
    assert 'href="report"' in browser.page("/run/small-s3/")


def test_mlflow_is_linked_where_it_is_a_server_and_else_its_command_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", mlflow={"experiment": "7", "parent": "abc"})

    def found(**tracking: object) -> tuple[str, str]:
        config = yaml.safe_load((run / "config.yaml").read_text()) | {"tracking": tracking}
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        return tracked(read_run(run))

    assert found(uri="https://user:secret@host:5000/x/") == ("link", "https://host:5000/x/#/experiments/7/runs/abc")
    assert found(uri=f"sqlite:///{tmp_path}/mlflow.db") == (
        "command",
        f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/mlflow.db",
    )
    assert found(enabled=False)[0] == "note"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking")
    assert found() == ("link", "http://tracking/#/experiments/7/runs/abc")
    assert found(uri="javascript://host/%0aalert(1)")[0] != "link"


def test_of_many_sets_those_that_are_confused_are_shown() -> None:
    tasks = [f"T{n}" for n in range(60)]
    shares = {task: {task: 100.0} for task in tasks} | {"T7": {"T7": 60.0, "T55": 40.0}}
    table = confusion_rows(tasks, tasks, shares, most=10)
    assert len(table["sets"]) == 10 and {"T7", "T55"} <= set(table["sets"]) and table["left_out"] == 50
    assert dict(table["rows"])["T7"][table["sets"].index("T55")] == ("T55", 40.0)


def test_a_run_that_is_being_written_says_by_whom(tmp_path: Path) -> None:
    run = run_with_pictures(tmp_path)
    browser = Browser(run)
    assert "in use by" not in browser.page("/run/small-s3/")
    with other_process_holds(run / "LOCK") as process:
        assert FileLock(run / "LOCK").is_held()
        for page in ("/", "/run/small-s3/", "/run/small-s3/add"):
            assert f"in use by process {process}" in browser.page(page)
        reply = browser.send("/run/small-s3/add", what="learn", task="new", root=str(tmp_path))
        assert reply.status_code == 409 and f"small-s3 is in use by process {process}" in reply.text
    assert not FileLock(run / "LOCK").is_held()
    assert not FileLock(run / "absent").is_held() and not (run / "absent").exists()
