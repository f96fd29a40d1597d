"""The report of a synthetic run: everything is on the page, nothing comes from elsewhere, user text stays text."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file
from typer.testing import CliRunner

from data_prep.shards import write_shards
from pipeline.cli.commands import app
from pipeline.data.sample import Sample
from pipeline.errors import EXIT_OK, EXIT_USER, UserError
from pipeline.report.figures import cell_colours
from pipeline.report.page import matrix_figure, terminal_table, write_report
from pipeline.report.predictions import OTHER, OWN, examples, routing_shares, similarity_distributions
from pipeline.report.tables import comparison_rows, cost_rows, metric_rows, seed_rows
from pipeline.runs.folder import read_run

TASKS = ["colour", "count", "boxes"]
ACCURACY = [[90.0, None, None], [80.0, 85.0, None], [60.0, 88.0, 95.0]]
ATTACK = "<script>alert(1)</script>"


class Page(HTMLParser):
    """Collects the tags, links and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids |= {value for name, value in attrs if name == "id" and value}
        self.links += [value or "" for name, value in attrs if name in {"src", "href", "xlink:href", "srcset", "data"}]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def make_run(folder: Path, stages: int = 3, prepared: str = "nowhere", **state: Any) -> Path:
    """A run folder as the sequence writes it, after so many stages."""
    folder.mkdir(parents=True)
    config = {
        "name": "small",
        "seed": 3,
        "data": {"prepared": prepared, "tasks": [{"name": task} for task in TASKS]},
        "model": {"path": "tiny-model"},
        "method": {"name": "modalprompt"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    state = {"recipe": "small", "method": "modalprompt", "status": "running", "timing": {"train_s": 12.5}} | state
    if state["method"] == "zero_shot":
        state["stages"] = []
    (folder / "run.json").write_text(json.dumps(state))
    for stage in range(stages):
        log = folder / "stages" / f"{stage + 1:02d}-{TASKS[stage]}" / "metrics.jsonl"
        log.parent.mkdir(parents=True)
        steps = [
            {"step": s, "loss": 3 / s, "loss_lm": 2 / s, "loss_image": 0.5 / s, "loss_text": 0.5 / s} for s in (1, 2, 3)
        ]
        log.write_text("\n".join(map(json.dumps, steps)) + '\n{"step": 4, "lo')  # the last line is being written
        save_file({"prompt": torch.zeros(2, 3), "prototype": torch.zeros(4)}, log.with_name("prompts.safetensors"))
        log.with_name("meta.json").write_text(json.dumps({"steps": 3, "seconds": 12.5, "world_size": 2, "loss": 1.0}))
        log.with_name("COMPLETE").write_text("")
        for task in TASKS[: stage + 1]:
            predictions = folder / "eval" / f"after-{stage + 1:02d}" / f"{task}.jsonl"
            predictions.parent.mkdir(parents=True, exist_ok=True)
            lines = [prediction(task, number, stage + 1) for number in range(4)]
            predictions.write_text("\n".join(map(json.dumps, lines)))
    if stages:
        rows = [row if t < stages else [None] * 3 for t, row in enumerate(ACCURACY)]
        routing = {"accuracy": [99.0, 97.0, 98.0][:stages] + [None] * (3 - stages), "image_only": [50.0, 40.0, 30.0]}
        matrix = {"tasks": TASKS, "zero_shot": [1.0, 2.0, 3.0], "accuracy": rows, "metrics": {}, "routing": routing}
        (folder / "matrix.json").write_text(json.dumps(matrix))
    return folder


def prediction(task: str, number: int, known: int) -> dict[str, Any]:
    similarity = [0.9 if name == task else 0.1 for name in TASKS[:known]]
    return {
        "id": f"{task}-{number}",
        "question": "Which colour & shape?",
        "prediction": ATTACK if number == 0 else "red",
        "answer": "red",
        "score": float(number > 0),
        "selected": [task],
        "similarity": similarity,
    }


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose report was written, compared with another run."""
    folder = tmp_path_factory.mktemp("runs")
    run, other = make_run(folder / "small-s3", recipe=ATTACK), make_run(folder / "other", status="done")
    assert write_report(run, [other]) == run / "report.html"
    return run


def test_the_page_holds_every_part_and_loads_nothing_from_elsewhere(reported: Path) -> None:
    text = (reported / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.ids >= {
        "comparison",
        "course",
        "matrix",
        "forgetting",
        "metrics",
        "routing-accuracy",
        "routing",
        "similarity",
        "losses",
        "costs",
        "examples",
        "tiles",
        "missing",
        "scores",
    }
    assert page.tags.count("svg") == 5
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert not {"script", "iframe"} & set(page.tags)
    assert not re.search(r"@import|url\((?!['\"]?#)", text)
    ids = re.findall(r'\sid="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def test_the_page_says_what_was_measured(reported: Path) -> None:
    words = Page((reported / "report.html").read_text(encoding="utf-8")).words
    for number in ("90.0", "80.0", "60.0", "95.0", "1.0", "81.0", "13.5", "−13.5", "99.0", "50.0"):
        assert number in words
    for word in ("modalprompt", "running", "tiny-model", "after boxes", "Which colour & shape?", "✓ right", "✗ wrong"):
        assert word in words


def test_every_metric_that_the_run_has_stands_on_the_page(tmp_path: Path) -> None:
    run, frozen = make_run(tmp_path / "run"), make_run(tmp_path / "no-zero-shot")
    matrix = json.loads((frozen / "matrix.json").read_text()) | {"zero_shot": None, "ahead": None}
    (frozen / "matrix.json").write_text(json.dumps(matrix))
    rows = {name: values for name, _, values in metric_rows([read_run(run), read_run(frozen)])}
    assert rows["retention"] == [pytest.approx(100 * (60 / 90 + 88 / 85) / 2)] * 2
    assert not {"mean_average_accuracy", "forgetting_coin"} & set(rows)  # other names of average and backward_transfer
    assert rows["gain"] == [pytest.approx(81.0 - 2.0), None]
    assert "forward_transfer" not in rows  # nothing was measured ahead


def test_forward_transfer_needs_the_scores_measured_ahead(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    matrix = json.loads((run / "matrix.json").read_text()) | {"ahead": [None, 12.0, 13.0]}
    (run / "matrix.json").write_text(json.dumps(matrix))
    assert {name: values for name, _, values in metric_rows([read_run(run)])}["forward_transfer"] == [10.0]


def test_majority_answer_and_retention_are_rows_of_the_matrix(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    matrix = json.loads((run / "matrix.json").read_text()) | {"majority": [11.5, 12.5, 14.5]}
    (run / "matrix.json").write_text(json.dumps(matrix))
    words = Page(write_report(run).read_text(encoding="utf-8")).words
    assert {"majority answer", "14.5", "retention", "66.7", "103.5"} <= set(words)


def test_runs_that_differ_in_their_seed_alone_get_a_mean_with_its_deviation(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"small-s{seed}") for seed in (0, 1)]
    for seed, run in enumerate(runs):
        config = yaml.safe_load((run / "config.yaml").read_text()) | {"seed": seed}
        (run / "config.yaml").write_text(yaml.safe_dump(config))
    matrix = json.loads((runs[1] / "matrix.json").read_text())
    matrix["accuracy"][2][0] = 70.0
    (runs[1] / "matrix.json").write_text(json.dumps(matrix))
    other = make_run(tmp_path / "other", recipe="another")
    (row,) = seed_rows([read_run(run) for run in (*runs, other)])
    assert (row["name"], row["seeds"]) == ("small, modalprompt", "0, 1")
    assert row["values"][0] == (65.0, pytest.approx(50**0.5))
    assert "65.0 ± 7.1" in Page(write_report(runs[0], [runs[1]]).read_text(encoding="utf-8")).words
    assert "± over seeds 0, 1" in printed(runs, width=200)


def test_the_cost_table_counts_what_was_trained_and_what_is_kept(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", stages=2)
    (run / "stages" / "02-count" / "COMPLETE").unlink()  # still being trained
    save_file(
        {"prompt": torch.zeros(2, 3), "head.fc1.weight": torch.zeros(5, 3), "prototype": torch.zeros(4)},
        run / "stages" / "01-colour" / "prompts.safetensors",
    )
    (row,) = cost_rows(read_run(run))
    assert (row["stage"], row["steps"], row["seconds"], row["ranks"]) == ("01-colour", 3, 12.5, 2)
    assert (row["trained"], row["kept"]) == (21, 10)
    assert row["samples_per_s"] is None


def test_similarities_are_those_to_the_own_set_and_to_the_best_other_one(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    lines = [prediction("count", number, 3) | {"similarity": [0.3, 0.8, -0.2]} for number in range(2)]
    (run / "eval" / "after-03" / "count.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert similarity_distributions(read_run(run))["count"] == {OWN: [0.8, 0.8], OTHER: [0.3, 0.3]}
    assert similarity_distributions(read_run(make_run(tmp_path / "sequential", method="sequential"))) == {}


def test_user_text_is_escaped(reported: Path) -> None:
    text = (reported / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert Page(text).words.count(ATTACK) == 1 + len(TASKS)  # the recipe's name and a prediction of each task


@pytest.mark.parametrize("name", ["matrix", "losses", "routing", "course", "forgetting", "similarity"])
def test_figures_are_saved_as_png_too(reported: Path, name: str) -> None:
    with Image.open(reported / "figures" / f"{name}.png") as image:
        assert min(image.size) > 200


@pytest.mark.parametrize("stages", [0, 2])
def test_a_run_in_progress_is_reported_as_far_as_it_is(tmp_path: Path, stages: int) -> None:
    run = make_run(tmp_path / "run", stages=stages)
    text = write_report(run).read_text(encoding="utf-8")
    expected = {0: "nothing scored yet", 2: "2 of 3 stages"}[stages]
    assert expected in text
    assert ("Nothing was evaluated yet." in text) == (stages == 0)
    assert comparison_rows([read_run(run)])[-1]["values"][3] == {0: None, 2: 82.5}[stages]


def test_thumbnails_come_from_the_prepared_data(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (400, 200), "red").save(buffer, "PNG")
    samples = [Sample("colour-1", buffer.getvalue(), "Which colour?", "red", {})]
    folder = tmp_path / "data" / "colour" / "test"
    write_shards(lambda start: iter(samples[start:]), folder, 10, "made here", "colour", "test")
    run = make_run(tmp_path / "run", prepared=str(tmp_path / "data"))
    images = {item["id"]: item["image"] for item in examples(read_run(run))}
    encoded = images.pop("colour-1")
    assert set(images.values()) == {None}
    with Image.open(io.BytesIO(base64.b64decode(encoded.removeprefix("data:image/png;base64,")))) as image:
        assert (image.size, image.getpixel((0, 0))) == ((128, 64), (255, 0, 0))


def test_a_damaged_shard_folder_only_costs_the_thumbnails(tmp_path: Path) -> None:
    broken = tmp_path / "data" / "colour" / "test"
    broken.mkdir(parents=True)
    (broken / "dataset.json").write_text("{")
    shown = examples(read_run(make_run(tmp_path / "run", prepared=str(tmp_path / "data"))))
    assert shown and all(item["image"] is None for item in shown)


def printed(paths: list[Path], width: int = 140) -> str:
    console = Console(width=width, file=io.StringIO(), no_color=True)
    console.print(terminal_table(paths))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_terminal_table_compares_runs(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "first"), make_run(tmp_path / "second", stages=2)
    lines = printed([first, second]).splitlines()
    assert any("(2 of 3 stages)" in line for line in lines)
    rows = {words[0]: words[1:] for line in lines if len(words := line.split()) == 7}
    assert rows["run"] == [*TASKS, "last", "forgot", "routing"]
    assert rows["zero-shot"] == ["1.0", "2.0", "3.0", "2.0", "–", "–"]
    assert rows["first"] == ["60.0", "88.0", "95.0", "81.0", "13.5", "98.0"]
    assert rows["second"] == ["80.0", "85.0", "–", "82.5", "10.0", "98.0"]


def test_a_narrow_terminal_folds_names_and_loses_no_number(tmp_path: Path) -> None:
    text = printed([make_run(tmp_path / "a-run-with-quite-a-long-name-in-the-folder")], width=50)
    for number in ("60.0", "88.0", "95.0", "81.0", "13.5", "98.0"):
        assert number in text


def test_a_zero_shot_run_is_the_zero_shot_row_and_not_another_one(tmp_path: Path) -> None:
    run = make_run(tmp_path / "frozen", method="zero_shot")
    matrix = {"tasks": TASKS, "zero_shot": [1.0, 2.0, 3.0], "accuracy": [[None] * 3] * 3, "metrics": {}}
    (run / "matrix.json").write_text(json.dumps(matrix))
    rows = comparison_rows([read_run(run), read_run(make_run(tmp_path / "other"))])
    assert [row["name"] for row in rows] == ["zero-shot", "other"]


def test_joint_training_has_only_its_last_row(tmp_path: Path) -> None:
    run = make_run(tmp_path / "joint", method="joint")
    matrix = {"tasks": TASKS, "zero_shot": None, "accuracy": [[None] * 3, [None] * 3, [60.0, 70.0, 80.0]]}
    (run / "matrix.json").write_text(json.dumps(matrix))
    (row,) = comparison_rows([read_run(run)])
    assert row["values"] == [60.0, 70.0, 80.0, 70.0, None, None]


def test_methods_without_trained_prototypes_show_only_which_sets_were_inserted(tmp_path: Path) -> None:
    routed, fixed = make_run(tmp_path / "a"), make_run(tmp_path / "b", method="sequential")
    assert [title.split(" (")[0] for title in routing_shares(read_run(routed))] == ["most similar set", "inserted sets"]
    assert [title.split(" (")[0] for title in routing_shares(read_run(fixed))] == ["inserted sets"]


def test_routing_counts_the_share_of_samples_per_set(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    lines = [prediction("colour", number, 3) for number in range(4)]
    lines[0] |= {"similarity": [0.1, 0.9, 0.2], "selected": ["boxes", "count"]}
    (run / "eval" / "after-03" / "colour.jsonl").write_text("\n".join(map(json.dumps, lines)))
    nearest, inserted = routing_shares(read_run(run)).values()
    assert nearest["colour"] == {"colour": 75.0, "count": 25.0}
    assert inserted["colour"] == {"colour": 75.0, "boxes": 25.0, "count": 25.0}


def test_runs_with_another_task_order_are_compared_task_by_task(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "first"), make_run(tmp_path / "second")
    matrix = {"tasks": TASKS[::-1], "zero_shot": [3.0, 2.0, 1.0], "accuracy": ACCURACY}
    (second / "matrix.json").write_text(json.dumps(matrix))
    rows = comparison_rows([read_run(first), read_run(second)])
    assert rows[-1]["values"][:3] == [95.0, 88.0, 60.0] and [row["note"] for row in rows[-2:]] == ["", ""]


def test_a_row_says_that_its_mean_is_of_other_tasks(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "first"), make_run(tmp_path / "second")
    content = json.loads((second / "matrix.json").read_text())
    content["tasks"] = ["other", *content["tasks"][1:]]
    (second / "matrix.json").write_text(json.dumps(content))
    rows = comparison_rows([read_run(first), read_run(second)])
    assert rows[-1]["values"][0] is None and rows[-2]["note"] == ""
    assert rows[-1]["note"] == f"last, forgetting and routing of its own tasks: {', '.join(content['tasks'])}"


def test_the_matrix_figure_is_drawn_from_a_matrix_alone(tmp_path: Path) -> None:
    matrix_figure({"tasks": TASKS, "accuracy": ACCURACY}, tmp_path / "deep" / "matrix.png")
    with Image.open(tmp_path / "deep" / "matrix.png") as image:
        assert image.format == "PNG"


def test_the_numbers_in_cells_stand_out_from_every_background() -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for score in range(101):
        low, high = sorted(luminance(colour) for colour in cell_colours(float(score)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, score  # WCAG AA


def change(file: str, **fields: Any) -> Any:
    """Puts wrong things into a file of a run, into the first line where it has many."""

    def damage(run: Path) -> None:
        first, _, rest = (run / file).read_text().partition("\n") if file.endswith("jsonl") else ("", "", "")
        whole = yaml.safe_load(first or (run / file).read_text()) | fields
        (run / file).write_text(json.dumps(whole) + ("\n" + rest if first else ""))

    return damage


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda run: run.joinpath("matrix.json").write_text("{"), "is not JSON"),
        (lambda run: run.joinpath("run.json").write_text("[]"), "holds no JSON object"),
        (lambda run: run.joinpath("config.yaml").write_text("a: [1"), "is not YAML"),
        (lambda run: run.joinpath("matrix.json").write_text('{"tasks": ["a"], "accuracy": [[1, 2]]}'), "task 2 after"),
        (lambda run: run.joinpath("matrix.json").write_text('{"tasks": ["a", "b"], "accuracy": [[1]]}'), "expected 2"),
        (change("matrix.json", accuracy=5), "accuracy: found 5, expected a list"),
        (change("matrix.json", accuracy=[[1.0, "x", None]] * 3), "accuracy.0.1: found 'x', expected a number"),
        (change("matrix.json", accuracy=[[1.0], [2.0]]), "2 rows for 1 tasks"),
        (change("matrix.json", zero_shot="none"), "zero_shot: found 'none', expected a list"),
        (change("matrix.json", routing=[99.0]), "routing: found .* expected a group of fields"),
        (change("matrix.json", routing={"accuracy": "all"}), "accuracy: found 'all', expected a list"),
        (change("matrix.json", tasks="colour"), "tasks: found 'colour', expected a list"),
        (change("run.json", skipped=3), "skipped.*: found 3, expected a list"),
        (change("run.json", stages=[1]), "stages.0: found 1, expected text"),
        (change("config.yaml", data=3), "data: found 3, expected a group of fields"),
        (change("config.yaml", method="modalprompt"), "method: found 'modalprompt', expected a group of fields"),
        (change("eval/after-03/count.jsonl", score="high"), "line 1: score: found 'high', expected a number"),
        (change("eval/after-03/count.jsonl", similarity=[0.1, "b"]), "similarity.1: found 'b', expected a number"),
        (change("eval/after-03/count.jsonl", selected="count"), "selected: found 'count', expected a list"),
        (change("stages/01-colour/metrics.jsonl", loss="low"), "line 1: loss: found 'low', expected a number"),
        (change("stages/01-colour/metrics.jsonl", step=None), "step: found None, expected a number"),
        (change("stages/01-colour/meta.json", seconds="12"), "seconds: found '12', expected a number"),
    ],
)
def test_a_damaged_run_is_named(tmp_path: Path, damage: Any, sentence: str) -> None:
    run = make_run(tmp_path / "run")
    damage(run)
    with pytest.raises(UserError, match=sentence):
        write_report(run)
    shown = CliRunner().invoke(app, ["report", str(run)])
    assert shown.exit_code == EXIT_USER and "Traceback" not in shown.stderr
    listed = CliRunner().invoke(app, ["ls", str(tmp_path)])
    assert listed.exit_code == EXIT_OK, listed.stderr


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing does not exist"):
        write_report(tmp_path / "missing")
    with pytest.raises(UserError, match="is not a run"):
        terminal_table([tmp_path])
    with pytest.raises(UserError, match="does not exist"):
        write_report(make_run(tmp_path / "run"), [tmp_path / "missing"])


def test_a_dollar_sign_in_a_name_is_no_formula(tmp_path: Path) -> None:
    run, other = make_run(tmp_path / r"run $\frac$"), make_run(tmp_path / "costs $5 to $7")
    assert r"$\frac$" in write_report(run, [other]).read_text(encoding="utf-8")
