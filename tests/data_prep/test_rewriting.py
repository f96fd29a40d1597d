"""Prepared data belongs to what made it: who shares a folder, what is rewritten, and what `check` and `run` refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep.prepare import prepare
from data_prep.split import LAST, NEXT
from pipeline.check.data import CheckedData
from pipeline.config.load import load_recipe
from pipeline.config.recipe import Recipe
from pipeline.data.origin import RECORDS, SETTINGS, SOURCE_FILES
from pipeline.data.shards import DATASET_FILE, IndexedShards
from pipeline.errors import UserError
from pipeline.runs.claim import claim_run
from pipeline.runs.data_use import data_record
from pipeline.sequence.add_task import prepare_addition
from pipeline.sequence.prepared import refuse_other_data, require_prepared
from tests.tiny_clip import picture

MakeRecipe = Callable[..., Recipe]


def train(recipe: Recipe) -> Path:
    return recipe.data.split_path("Shapes", "train")


def limited(recipe: MakeRecipe, limit: int, **data: Any) -> Recipe:
    return recipe(tasks=[{"name": "Shapes", "limit_train": limit}], **data)


def wrote(recipe: Recipe, **options: Any) -> list[list[str]]:
    return [split["wrote"] for split in prepare(recipe, progress=False, **options)["splits"]]


def state(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def edit(recipe: Recipe, answer: str = "another") -> None:
    """Correct the answer of the first training record in the source."""
    path = Path(recipe.data.root) / "instructions" / "Shapes" / "train.json"
    entries = json.loads(path.read_text())
    entries[0]["conversations"][1]["value"] = answer
    path.write_text(json.dumps(entries))


def forget_settings(recipe: Recipe) -> None:
    """Make prepared splits those of an earlier version."""
    for path in Path(recipe.data.prepared).rglob(DATASET_FILE):
        description = json.loads(path.read_text())
        path.write_text(
            json.dumps({k: v for k, v in description.items() if k not in (SETTINGS, RECORDS, SOURCE_FILES)})
        )
    for path in Path(recipe.data.prepared).rglob("*.source.parquet"):
        path.unlink()


def used_by_a_run(recipe: Recipe) -> Path:
    run = recipe.run_path
    run.mkdir(parents=True)
    recipe.dump_yaml(run / "config.yaml")
    splits = [
        ("Shapes", split, IndexedShards(recipe.data.split_path("Shapes", split)), None) for split in ("train", "test")
    ]
    (run / "run.json").write_text(json.dumps({"data": data_record(splits)}))
    return run


@pytest.fixture
def own(recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A prepared recipe whose runs are in a folder of this test."""
    monkeypatch.chdir(tmp_path)
    built = recipe()
    prepare(built, progress=False)
    return built


# ---------------------------------------------------------------------- the default folder


def test_recipes_that_differ_in_method_share_a_folder_and_other_limits_never_do() -> None:
    nano = load_recipe("nano").data.prepared
    for same in ("nano_paper", "nano_sequential", "nano_independent"):
        assert load_recipe(same).data.prepared == nano
    changes = (
        "data.tasks.Count.limit_train=200",
        "data.seed=1",
        "data.root=elsewhere",
        "keys.text_truncation=tail",
        "data.repeated_ids=number",
    )
    others = {load_recipe("nano", [change]).data.prepared for change in changes}
    assert len(others | {nano}) == len(changes) + 1


def test_a_choice_of_tasks_in_any_order_shares_the_folder_of_all() -> None:
    whole = load_recipe("coin_llava15_7b")
    assert load_recipe("coin_llava15_7b", ["data.tasks=[GQA, VizWiz, ScienceQA]"]).data.prepared == whole.data.prepared
    free = ("name=other", "seed=3", "train.epochs=1", "data.workers=4", "data.skip_bad=5", "keys.batch=8")
    for change in free:
        assert load_recipe("coin_llava15_7b", [change]).data.prepared == whole.data.prepared, change


def test_tasks_with_unlike_limits_never_share_with_tasks_that_have_them_the_other_way_round() -> None:
    one, other = (
        load_recipe("nano", ["data.tasks=[Count, Words]", f"data.tasks.{name}.limit_train=9"]).data.prepared
        for name in ("Count", "Words")
    )
    assert one != other


def test_a_recipe_may_name_a_folder_with_the_settings_in_it() -> None:
    named = load_recipe("nano", ["data.prepared=/scratch/{settings}"]).data.prepared
    assert named == f"/scratch/{Path(load_recipe('nano').data.prepared).name}"


def test_a_folder_of_an_earlier_version_is_named_where_the_default_one_is_empty(
    recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    prepare(recipe(prepared="data/tiny"), progress=False)
    with pytest.raises(UserError, match=r"data/tiny has a prepared task 'Shapes'; `--set data\.prepared=data/tiny`"):
        require_prepared(recipe(prepared="data/prepared/{settings}").data, "tiny")
    with pytest.raises(UserError, match=r"prepare tiny` first\.$"):
        require_prepared(recipe(prepared="elsewhere").data, "tiny")


def test_benchmarks_of_the_same_shots_share_a_folder() -> None:
    from pipeline.clip.recipe import load_benchmark

    folders = {name: load_benchmark(name).data.prepared for name in ("base2new_vitb16", "cross_vitb16")}
    assert len(set(folders.values())) == 1
    assert load_benchmark("base2new_vitb16", ["data.shots=4"]).data.prepared not in folders.values()
    assert load_benchmark("base2new_vitb16", ["seeds=[9]"]).data.prepared in folders.values()


# ---------------------------------------------------------------------- what prepare keeps and rewrites


def test_a_smaller_limit_keeps_what_is_there_and_a_larger_one_is_refused(own: Recipe, recipe: MakeRecipe) -> None:
    before = state(train(own))
    assert wrote(limited(recipe, 4)) == [[], []]
    assert state(train(own)) == before
    small = limited(recipe, 4, prepared="small")
    prepare(small, progress=False)
    with pytest.raises(UserError, match="holds the first 4 of 7 records, the recipe wants all"):
        prepare(recipe(prepared="small"), progress=False)
    assert len(IndexedShards(train(small))) == 4
    assert wrote(recipe(prepared="small"), replace=True)[0] == ["shards", "keys"]


def test_a_limit_beyond_the_source_is_no_other_limit(own: Recipe, recipe: MakeRecipe) -> None:
    assert wrote(limited(recipe, 100)) == [[], []]


def test_an_edited_source_is_taken_up_where_no_run_depends_on_the_old_one(own: Recipe) -> None:
    edit(own)
    assert wrote(own) == [["shards", "keys"], []]
    assert IndexedShards(train(own))[0].answer == "another"
    assert not list(Path(own.data.prepared).rglob(f"*{NEXT}")) + list(Path(own.data.prepared).rglob(f"*{LAST}"))


def test_what_a_run_used_is_rewritten_with_replace_only(own: Recipe) -> None:
    run = used_by_a_run(own)
    edit(own)
    before = state(Path(own.data.prepared) / "Shapes" / "train")
    with pytest.raises(UserError, match=rf"and {run} used what was prepared.* --replace"):
        prepare(own, progress=False)
    assert state(train(own)) == before
    assert wrote(own, replace=True)[0] == ["shards", "keys"]


def test_a_run_of_an_earlier_version_is_found_too(own: Recipe) -> None:
    run = used_by_a_run(own)
    (run / "run.json").write_text("{}")
    edit(own)
    with pytest.raises(UserError, match=rf"and {run} used what was prepared"):
        prepare(own, progress=False)


def test_a_rewrite_that_fails_leaves_what_there_was(own: Recipe) -> None:
    before = state(train(own))
    edit(own)
    path = Path(own.data.root) / "instructions" / "Shapes" / "train.json"
    entries = json.loads(path.read_text())
    entries[6]["conversations"][1]["value"] = ""
    path.write_text(json.dumps(entries))
    with pytest.raises(UserError, match="its answer is empty"):
        prepare(own, progress=False)
    assert state(train(own)) == before
    edit(own, "mended")
    entries[6]["conversations"][1]["value"] = "full"
    path.write_text(json.dumps(entries))
    assert wrote(own)[0] == ["shards", "keys"]
    assert IndexedShards(train(own))[6].answer == "full"


def test_data_of_which_a_shard_is_open_over_nfs_is_rewritten_again_and_again(
    own: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # a file that is open keeps its folder
    for answer in ("one", "two", "three"):
        edit(own, answer)
        prepare(own, progress=False, replace=True)
        assert IndexedShards(train(own))[0].answer == answer


@pytest.mark.parametrize("left", [(NEXT,), (LAST,), (NEXT, LAST)])
def test_a_rewrite_that_is_killed_while_folders_change_places_is_finished(own: Recipe, left: tuple[str, ...]) -> None:
    folder = train(own)
    for ending in left:
        shutil.copytree(folder, folder.with_name(folder.name + ending))
    shutil.rmtree(folder)
    assert wrote(own) == [[], []]
    assert [path.name for path in sorted(folder.parent.glob("train*")) if path.is_dir()] == ["train"]


def test_files_that_were_copied_or_written_anew_with_the_same_content_change_nothing(own: Recipe) -> None:
    used_by_a_run(own)
    before = {path: path.stat().st_mtime_ns for path in train(own).glob("*.tar")}
    root = Path(own.data.root)
    for path in root.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            path.unlink()
            path.write_bytes(content + b"\n" * (path.suffix == ".json"))
    assert wrote(own) == [[], []]
    assert {path: path.stat().st_mtime_ns for path in train(own).glob("*.tar")} == before
    refuse_other_data(own.data, own.run_path)


def test_data_of_an_earlier_version_is_taken_up_without_rewriting(own: Recipe, recipe: MakeRecipe) -> None:
    forget_settings(own)
    refuse_other_data(own.data, own.run_path)
    four = limited(recipe, 4)
    refuse_other_data(four.data, four.run_path)
    assert wrote(own) == [[], []]
    assert SETTINGS in json.loads((train(own) / DATASET_FILE).read_text())


# ---------------------------------------------------------------------- what check and run refuse


def look(recipe: Recipe) -> list[Callable[[], object]]:
    data, run = recipe.data, recipe.run_path
    return [lambda: refuse_other_data(data, run), lambda: CheckedData(data, run, "tiny").check(None, None)]


@pytest.mark.parametrize("verb", [0, 1], ids=["run", "check"])
@pytest.mark.parametrize("earlier", [False, True], ids=["now", "earlier version"])
def test_a_source_that_was_edited_since_is_said(own: Recipe, verb: int, earlier: bool) -> None:
    if earlier:
        forget_settings(own)
    look(own)[verb]()
    edit(own)
    with pytest.raises(UserError, match=r"was prepared (before .*train\.json changed|from another state)"):
        look(own)[verb]()


@pytest.mark.parametrize("verb", [0, 1], ids=["run", "check"])
def test_a_task_that_was_added_to_a_run_on_generated_tasks_is_that_tasks_data(
    own: Recipe, recipe: MakeRecipe, tmp_path: Path, verb: int
) -> None:
    look(recipe(source="generated", root=str(tmp_path / "drawn")))[verb]()
    drawn = recipe(source="generated")  # a root in which the generator has drawn a task of this name
    with pytest.raises(UserError, match="was made with source coin, the recipe has generated"):
        look(drawn)[verb]()


@pytest.mark.parametrize("verb", [0, 1], ids=["run", "check"])
def test_a_begun_run_of_an_earlier_version_goes_on_with_its_data_when_the_source_was_edited(
    own: Recipe, verb: int
) -> None:
    forget_settings(own)
    run = own.run_path
    splits = ("train", "test")
    fingerprints = {split: IndexedShards(own.data.split_path("Shapes", split)).fingerprint for split in splits}
    for path, content in (
        ("run.json", {"status": "stopped"}),
        ("stages/01-Shapes/meta.json", {"data": {"Shapes": fingerprints["train"]}}),
        ("eval/after-01/Shapes.score.json", {"made_with": {"data": fingerprints["test"]}}),
    ):
        (run / path).parent.mkdir(parents=True, exist_ok=True)
        (run / path).write_text(json.dumps(content))
    edit(own)
    look(own)[verb]()


def test_check_says_that_an_image_has_another_size_than_when_it_was_prepared(own: Recipe) -> None:
    next((Path(own.data.root) / "images").glob("Shapes-train-*.png")).write_bytes(picture(50, (40, 30)))
    with pytest.raises(UserError, match=r"was prepared before images/Shapes-train-\d\.png changed"):
        CheckedData(own.data, own.run_path, "tiny").check(None, None)


@pytest.mark.parametrize("verb", [0, 1], ids=["run", "check"])
def test_fewer_records_than_the_recipe_wants_are_refused(recipe: MakeRecipe, verb: int) -> None:
    prepare(limited(recipe, 4), progress=False)
    look(limited(recipe, 3))[verb]()
    for wanted, said in ((recipe(), "all"), (limited(recipe, 6), "6")):
        with pytest.raises(UserError, match=f"holds the first 4 of 7 records, the recipe wants {said}"):
            look(wanted)[verb]()


@pytest.mark.parametrize("verb", [0, 1], ids=["run", "check"])
def test_data_made_by_other_settings_is_refused(own: Recipe, recipe: MakeRecipe, verb: int) -> None:
    with pytest.raises(UserError, match=r"was made with data\.repeated_ids refuse, the recipe has number.*--replace"):
        look(recipe(repeated_ids="number"))[verb]()


def test_a_run_that_has_begun_goes_on_whatever_became_of_the_source(own: Recipe) -> None:
    used_by_a_run(own)
    edit(own)
    for verb in look(own):
        verb()


@pytest.mark.parametrize("gone", ["images", "."])
def test_data_whose_source_is_gone_is_as_good(own: Recipe, gone: str) -> None:
    shutil.rmtree(Path(own.data.root) / gone)
    for verb in look(own):
        verb()


# ---------------------------------------------------------------------- several processes


def test_a_second_prepare_waits_and_finds_everything_done(
    recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.files.lock import FileLock

    built, tries, acquire = recipe(), list[Path](), FileLock.acquire

    def other_process_first(lock: FileLock) -> bool:
        tries.append(lock.path)
        if tries.count(lock.path) == 1:
            return False
        if tries.count(lock.path) == 2 and lock.path.name == "train.lock":
            monkeypatch.setattr(FileLock, "acquire", acquire)
            prepare(built, progress=False)
        return acquire(lock)

    monkeypatch.setattr(FileLock, "acquire", other_process_first)
    monkeypatch.setattr("pipeline.files.lock.POLL_S", 0.0)
    assert wrote(built) == [[], []]


# ---------------------------------------------------------------------- going on with a run elsewhere


def test_places_of_data_and_models_may_be_others_when_a_run_goes_on(own: Recipe, tmp_path: Path) -> None:
    run = claim_run(own)
    elsewhere = own.model_copy(
        update={
            "data": own.data.model_copy(update={"prepared": "copied", "root": "moved"}),
            "model": own.model.model_copy(update={"path": str(tmp_path / "model")}),
            "keys": own.keys.model_copy(update={"path": str(tmp_path / "clip")}),
        }
    )
    assert claim_run(elsewhere) == run


def test_a_task_that_differs_is_named_with_its_field(own: Recipe, recipe: MakeRecipe) -> None:
    claim_run(own)
    with pytest.raises(UserError, match=r"data\.tasks\.Shapes\.metric: exact there, iou now"):
        claim_run(recipe(tasks=[{"name": "Shapes", "metric": "iou"}]))
    with pytest.raises(UserError, match=r"data\.tasks: Shapes there, Shapes, More now"):
        claim_run(recipe(tasks=[{"name": "Shapes"}, {"name": "More"}]))


def test_a_name_that_another_run_s_task_has_is_refused_with_what_add_can_do(
    own: Recipe, recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.sequence.add_task._require_finished", lambda run, recipe: None)
    used_by_a_run(own)
    other = recipe(tasks=[{"name": "Another"}]).model_copy(update={"run_dir": "runs/other"})
    other.run_path.mkdir(parents=True)
    other.dump_yaml(other.run_path / "config.yaml")
    edit(own)
    with pytest.raises(UserError, match=r"used what was prepared .*\. Give the task another name with `new-task`"):
        prepare_addition(other.run_path, "Shapes", Path(own.data.root))
