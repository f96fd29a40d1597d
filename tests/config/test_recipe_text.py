"""What people write in recipes: keys twice, words that YAML takes for values, fields that take others back, paths."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.clip.recipe import load_benchmark
from pipeline.config.load import load_recipe, load_run
from pipeline.config.recipe import Recipe
from pipeline.config.yaml_file import find_recipe, read_recipe
from pipeline.errors import UserError
from pipeline.files.paths import command, expanded
from pipeline.files.strict_text import load_json, load_yaml
from pipeline.runs.folder import read_run
from pipeline.sequence.add_task import prepare_addition
from pipeline.training.deepspeed_config import deepspeed_file


def refusal(*arguments: object, load=load_recipe) -> str:
    with pytest.raises(UserError) as caught:
        load(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def recipe(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_every_key_that_stands_twice_is_named_with_its_lines(tmp_path: Path) -> None:
    file = recipe(tmp_path / "mine.yaml", "extends: nano\ntrain:\n  steps: 10\nseed: 1\ntrain: {clip: 2}\nseed: 2\n")
    message = refusal(file)
    assert "'seed' stands in lines 4 and 6, 'train' stands in lines 2 and 5" in message and str(file) in message


@pytest.mark.parametrize(
    "text", ["data: {tasks: [{name: A, name: B}]}", "train:\n  clip: 1\n  'clip': 2\n", "model: {path: a, path: a}"]
)
def test_a_key_is_found_twice_at_any_depth(tmp_path: Path, text: str) -> None:
    assert "expected every key once" in refusal(recipe(tmp_path / "mine.yaml", f"extends: nano\n{text}"))


def test_a_key_that_stands_twice_in_the_recipe_below_is_found(tmp_path: Path) -> None:
    recipe(tmp_path / "below.yaml", "extends: nano\nseed: 1\nseed: 2\n")
    assert "below.yaml" in refusal(recipe(tmp_path / "above.yaml", "extends: below\n"))


def test_an_override_with_a_key_twice_is_refused() -> None:
    assert "--set model: 'path' stands in line 1, 2 times" in refusal("nano", ["model={path: a, path: b}"])


def test_what_a_merge_key_brings_in_may_be_overridden() -> None:
    text = "base: &base {a: 1, b: 2}\nmore: &more {<<: *base, a: 3}\nuse: {<<: *more, <<: *base, b: 4}\n"
    assert load_yaml(text)["more"] == {"a": 3, "b": 2} and load_yaml(text)["use"]["b"] == 4


@pytest.mark.parametrize(("text", "key"), [("on: 1", "on"), ("train: {2024: 1}", "2024"), ("? [a]\n: 1", "")])
def test_a_key_that_is_no_text_is_named_with_its_line(text: str, key: str) -> None:
    message = refusal(text, load=load_yaml)
    assert message.startswith("line 1: ") and (f'"{key}"' in message or not key)


def test_json_files_have_every_key_once(tmp_path: Path) -> None:
    assert load_json('{"a": {"b": 1}, "b": [1]}') == {"a": {"b": 1}, "b": [1]}
    assert "'b' stands in lines 2 and 3" in refusal('{"a": {\n"b": 1,\n"b": 2}}', load=load_json)
    file = recipe(tmp_path / "ds.json", '{"zero_optimization": {}, "zero_optimization": {}}')
    assert str(file) in refusal(str(file), load=deepspeed_file)


def test_a_task_file_has_every_key_once(tmp_path: Path) -> None:
    load_recipe("nano").dump_yaml(tmp_path / "run" / "config.yaml")
    folder = tmp_path / "coin" / "instructions" / "Mine"
    folder.mkdir(parents=True)
    (folder / "task.json").write_text('{"metric": "exact", "metric": "iou"}')
    assert "task.json: 'metric'" in refusal(tmp_path / "run", "Mine", tmp_path / "coin", load=prepare_addition)


def test_the_report_reads_no_recipe_with_a_key_twice(tmp_path: Path) -> None:
    recipe(tmp_path / "config.yaml", "data: {prepared: a}\ndata: {prepared: b}\n")
    assert "'data' stands in lines 1 and 2" in refusal(tmp_path, load=read_run)


@pytest.mark.parametrize(
    ("value", "words"),
    [("[Yes, No]", '"Yes", "No"'), ("[1, 2]", '"1", "2"'), ("2024", '"2024"'), ("[1.0e+3]", '"1.0e+3"')],
)
def test_tasks_chosen_by_names_that_yaml_takes_for_values_are_to_be_quoted(value: str, words: str) -> None:
    message = refusal("nano", [f"data.tasks={value}"])
    assert words in message and "quote" in message and message.count(". ") == 0


@pytest.mark.parametrize(
    "value", ["[{name: 2024}]", "[{name: on}, {name: 2024-01-01}]", "[{name: 1_000}, {name: 1.5}]"]
)
def test_a_name_that_yaml_takes_for_a_value_gets_one_sentence(value: str) -> None:
    message = refusal("nano", [f"data.tasks={value}"])
    assert "quote it" in message and message.count("found") == 1 and "more entries" not in message


def test_a_name_in_quotes_is_taken() -> None:
    tasks = load_recipe("nano", ['data.tasks=[{name: "Yes"}, {name: "2024"}]']).data.tasks
    assert [task.name for task in tasks] == ["Yes", "2024"]
    assert [task.name for task in load_recipe("nano", ['data.tasks=["Colours"]']).data.tasks] == ["Colours"]


def test_a_benchmarks_names_alone_are_to_be_quoted() -> None:
    message = refusal("base2new_nano", ["data.datasets=[2024, on]"], load=load_benchmark)
    assert "found 2024, true" in message and "quote it" in message and message.count("found") == 1


def test_epochs_given_later_take_the_steps_of_the_recipe_back(tmp_path: Path) -> None:
    file = recipe(tmp_path / "mine.yaml", "extends: nano\ntrain: {epochs: 3}\n")
    for loaded in (load_recipe("nano", ["train.epochs=3"]), load_recipe(file)):
        assert (loaded.train.epochs, loaded.train.steps) == (3, None)


def test_of_epochs_and_steps_on_the_command_line_the_later_counts() -> None:
    assert load_recipe("nano", ["train.epochs=3", "train.steps=5"]).train.steps == 5
    assert load_recipe("nano", ["train.steps=5", "train.epochs=3"]).train.steps is None


def test_steps_beside_epochs_still_count(tmp_path: Path) -> None:
    file = recipe(tmp_path / "mine.yaml", "extends: nano\ntrain: {epochs: 3, steps: 5}\n")
    assert load_recipe(file).train.steps == 5
    load_recipe("nano").dump_yaml(tmp_path / "run" / "config.yaml")  # has both, as every resolved recipe
    assert load_run(tmp_path / "run").train.steps == 150


def resolved(*overrides: str) -> Recipe:
    return load_recipe("nano", overrides)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("field", "found"),
    [
        ("run_dir", lambda r: str(r.run_path)),
        ("data.root", lambda r: r.data.root),
        ("data.prepared", lambda r: r.data.prepared),
        ("model.path", lambda r: r.model.path),
        ("keys.path", lambda r: r.keys.path),
        ("train.deepspeed", lambda r: r.train.deepspeed),
        ("data.tasks.Count.annotations", lambda r: r.data.tasks[2].annotations),
    ],
)
def test_every_path_of_a_recipe_may_begin_at_home(home: Path, field: str, found) -> None:
    assert found(resolved(f"{field}=~/x")) == found(resolved(f"{field}=$HOME/x")) == str(home / "x")


def test_the_paths_of_a_benchmark_may_begin_at_home(home: Path) -> None:
    loaded = load_benchmark("base2new_nano", ["run_dir=~/r", "data.root=~/d", "model.path=${HOME}/m"])
    assert (str(loaded.run_path), loaded.data.root, loaded.model.path) == tuple(str(home / x) for x in "rdm")


def test_the_tracking_file_may_be_at_home_and_a_password_keeps_its_dollar(home: Path) -> None:
    assert resolved("tracking.uri=sqlite:///~/m.db").tracking.uri == f"sqlite:///{home}/m.db"
    assert resolved("tracking.uri=http://a:$HOME@b").tracking.uri == "http://a:$HOME@b"


def test_a_recipe_file_may_be_at_home(home: Path) -> None:
    home.mkdir()
    recipe(home / "mine.yaml", "extends: nano\n")
    assert read_recipe(find_recipe("~/mine.yaml"))["name"] == "mine"


@pytest.mark.parametrize(
    ("path", "words"), [("~nobody-here/x", "home folder of a user"), ("$NOT_SET/x", "NOT_SET, which is not set")]
)
def test_a_home_or_variable_that_is_not_there_is_said(home: Path, path: str, words: str) -> None:
    message = refusal("nano", [f"data.root={path}"])
    assert words in message and message.count("data.root") == 1


def test_a_folder_that_is_called_tilde_is_not_guessed_at(home: Path) -> None:
    Path("~/x").mkdir(parents=True)
    assert f"means '{home}/x'" in refusal("~/x", load=expanded)
    assert expanded("./~/x") == "./~/x"


def test_a_file_with_a_dollar_in_its_name_is_found(home: Path) -> None:
    Path("a$HOME").mkdir()
    assert expanded("a$HOME") == "a$HOME"


def test_a_shown_command_survives_a_shell() -> None:
    assert command("add", "RUN", Path("my task")) == "python -m pipeline add RUN 'my task'"


def test_a_run_folder_in_place_of_a_recipe_is_said_with_its_recipe(tmp_path: Path) -> None:
    load_recipe("nano").dump_yaml(tmp_path / "run" / "config.yaml")
    assert f"'{tmp_path / 'run' / 'config.yaml'}'" in refusal(str(tmp_path / "run"))


def test_an_adapter_in_place_of_a_recipe_is_said(tmp_path: Path) -> None:
    (tmp_path / "adapter.json").write_text(json.dumps({}))
    assert "expected a recipe" in refusal(str(tmp_path))


@pytest.mark.parametrize("load", [load_run, read_run])
def test_a_file_of_a_run_in_place_of_its_folder_is_said_to_be_a_file(tmp_path: Path, load) -> None:
    load_recipe("nano").dump_yaml(tmp_path / "config.yaml")
    assert "is a file" in refusal(tmp_path / "config.yaml", load=load)
