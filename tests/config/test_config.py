"""Recipes: what they hold, how they are overridden, and the sentence for each way to get one wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.kinds import recipe_kind
from pipeline.config.load import load_recipe, load_run
from pipeline.config.method import method_options
from pipeline.config.paths import locate
from pipeline.config.recipe import Recipe
from pipeline.config.yaml_file import recipe_names
from pipeline.errors import UserError, nearest
from pipeline.methods.modalprompt import ModalPromptOptions
from pipeline.training.deepspeed_config import RECIPE_OWNS, accumulation, deepspeed_config

MINIMAL = """
data:
  source: coin
  root: coin
  tasks: [{name: A}, {name: B, metric: iou}]
model: {path: model}
keys: {path: clip}
train: {lr_prompt: 1e-2, lr_head: 1e-3}
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(MINIMAL)
    return path


@pytest.mark.parametrize("name", [name for name in recipe_names() if recipe_kind(name) is None])
def test_every_shipped_recipe_loads_and_has_its_file_name(name: str) -> None:
    assert load_recipe(name).name == name


def test_the_shipped_default_fits_two_ranks_and_one() -> None:
    recipe = load_recipe("nano")
    for ranks in (1, 2):
        micro, steps = accumulation(recipe.train, ranks)
        assert micro * steps * ranks == recipe.train.global_batch


def test_coin_is_in_its_published_order_with_the_official_learning_rate() -> None:
    recipe = load_recipe("coin_llava15_7b")
    names = [task.name for task in recipe.data.tasks]
    assert names == ["ScienceQA", "TextVQA", "ImageNet", "GQA", "VizWiz", "Grounding", "VQAv2", "OCRVQA"]
    assert (recipe.train.lr_prompt, recipe.train.lr_head, recipe.train.schedule) == (2e-4, 2e-4, "constant")
    assert isinstance(recipe.method, ModalPromptOptions)
    assert (recipe.method.k, recipe.method.gate, recipe.method.prompt_length) == (3, None, 10)


def test_a_recipe_without_a_name_is_named_after_its_file(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    assert recipe.name == "small"
    assert recipe.run_path == Path("runs/small-modalprompt-s0")


def test_the_run_folder_follows_method_and_seed(recipe_file: Path) -> None:
    assert load_recipe(recipe_file, ["method.name=joint", "seed=7"]).run_path == Path("runs/small-joint-s7")


def test_a_recipe_cannot_be_changed(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.lr_prompt = 1.0  # type: ignore[misc]


def test_a_written_recipe_reads_back_equal(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file, ["train.betas=[0.8, 0.9]", "method.gate=0.1"])
    recipe.dump_yaml(tmp_path / "run" / "config.yaml")
    assert load_run(tmp_path / "run") == recipe
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_extends_merges_mappings_and_replaces_lists(recipe_file: Path) -> None:
    child = recipe_file.with_name("child.yaml")
    child.write_text("extends: small\ndata: {tasks: [{name: C}]}\nmethod: {k: 1}\n")
    recipe = load_recipe(child)
    assert [task.name for task in recipe.data.tasks] == ["C"]
    assert isinstance(recipe.method, ModalPromptOptions)
    assert (recipe.name, recipe.method.k, recipe.data.source, recipe.train.lr_prompt) == ("child", 1, "coin", 1e-2)


def test_a_recipe_that_extends_itself_is_refused(recipe_file: Path) -> None:
    recipe_file.write_text("extends: other\n")
    recipe_file.with_name("other.yaml").write_text("extends: small\n")
    with pytest.raises(UserError, match="extends itself"):
        load_recipe(recipe_file)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.lr_prompt=2e-4", lambda r: r.train.lr_prompt == 2e-4),  # YAML 1.1 reads 2e-4 as text
        ("train.clip=null", lambda r: r.train.clip is None),
        ("data.tasks.1.limit_train=50", lambda r: r.data.tasks[1].limit_train == 50),
        ("data.tasks.B.limit_test=5", lambda r: r.data.tasks[1].limit_test == 5),
        ("data.tasks=[B, A]", lambda r: [(t.name, t.metric) for t in r.data.tasks] == [("B", "iou"), ("A", "exact")]),
        ("data.tasks=B", lambda r: [t.name for t in r.data.tasks] == ["B"]),
        ("evaluate.zero_shot=false", lambda r: r.evaluate.zero_shot is False),
        ("tracking.uri=http://host:5000/?a=b", lambda r: r.tracking.uri == "http://host:5000/?a=b"),
    ],
)
def test_an_override_sets_one_field(recipe_file: Path, override: str, value) -> None:
    assert value(load_recipe(recipe_file, [override]))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trian.lr_prompt=1", ["unknown field 'trian'", "Did you mean 'train'?"]),
        ("train.lr_promt=1", ["unknown field 'train.lr_promt'", "Did you mean 'lr_prompt'?"]),
        ("lr_prompt=1", ["unknown field 'lr_prompt'", "Did you mean 'train.lr_prompt'?"]),
        ("data.tasks.0.limit_trian=1", ["'data.tasks.0.limit_trian'", "Did you mean 'limit_train'?"]),
        ("data.tasks.0.metric=exat", ["data.tasks.0.metric", "'exat'", "iou", "Did you mean 'exact'?"]),
        ("data.tasks=[A, a2]", ["unknown task 'a2'", "A, B", "written {name: a2}"]),
        ("data.tasks.9.limit_train=1", ["no item '9'", "0 to 1"]),
        ("data.tasks=[]", ["data.tasks", "expected"]),
        ("data.tasks=[A, A]", ["data.tasks", "every task once", "A"]),
        ("data.source=coyn", ["data.source", "'coyn'", "Did you mean 'coin'?"]),
        ("method.name=modalpromt", ["method.name", "'modalpromt'", "sequential", "Did you mean 'modalprompt'?"]),
        ("method.k=0", ["method.k", "found 0", "greater than or equal to 1"]),
        ("train.lr_prompt=fast", ["train.lr_prompt", "'fast'", "a number"]),
        ("train.lr_prompt=.nan", ["train.lr_prompt", "nan", "finite"]),
        ("train.micro_batch=5", ["micro_batch 5", "1, 2, 4, 8, 16"]),
        ("seed=1.5", ["seed", "1.5", "a whole number"]),
        ("seed.x=1", ["seed", "{'x': 1}", "a whole number"]),
        ("train.clip.norm=1.5", ["train.clip", "a number"]),
        ("model.path.x=1", ["model.path is a single value", "'model'"]),
        ("model=big", ["model", "'big'", "a group of fields"]),
        ("name=a/b", ["name", "'a/b'", "letters"]),
        ("run_dir='runs/{nme}'", ["run_dir", "{nme}", "{name}, {method} and {seed}"]),
        ("seed", ["'seed' is not an assignment", "name=value"]),
        ("seed=[1", ["seed", "not YAML"]),
    ],
)
def test_a_wrong_override_is_told_in_one_line(recipe_file: Path, override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(recipe_file, [override])
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_all_wrong_fields_are_named_at_once(recipe_file: Path) -> None:
    with pytest.raises(UserError, match=r"seed: found -1.*train\.warmup: found 2"):
        load_recipe(recipe_file, ["seed=-1", "train.warmup=2"])


def test_a_missing_field_is_named_with_its_meaning(recipe_file: Path) -> None:
    recipe_file.write_text(MINIMAL.replace("lr_prompt: 1e-2, ", ""))
    with pytest.raises(UserError, match=r"train\.lr_prompt is missing.*learning rate"):
        load_recipe(recipe_file)


def test_an_unknown_recipe_gets_the_nearest_name() -> None:
    with pytest.raises(
        UserError, match=r"unknown recipe 'nanno'\. Did you mean 'nano'\? Expected one of .*coin_llava15_7b"
    ):
        load_recipe("nanno")


def test_a_syntax_error_names_the_line(recipe_file: Path) -> None:
    recipe_file.write_text("name: small\ndata: [1, 2\nmodel: x\n")
    with pytest.raises(UserError, match="line 3"):
        load_recipe(recipe_file)


@pytest.mark.parametrize("content", ["", "- a\n- b\n", "just text\n"])
def test_a_file_without_fields_is_refused(recipe_file: Path, content: str) -> None:
    recipe_file.write_text(content)
    with pytest.raises(UserError, match="holds no fields"):
        load_recipe(recipe_file)


def test_a_binary_file_is_refused(recipe_file: Path) -> None:
    recipe_file.write_bytes(b"\x80\x81\x82")
    with pytest.raises(UserError, match="cannot be read"):
        load_recipe(recipe_file)


def test_a_folder_that_is_no_run_is_refused_with_the_nearest_run(recipe_file: Path, tmp_path: Path) -> None:
    load_recipe(recipe_file).dump_yaml(tmp_path / "runs" / "small-s0" / "config.yaml")
    with pytest.raises(UserError, match=r"small-s1' does not exist.*Did you mean 'small-s0'\?"):
        load_run(tmp_path / "runs" / "small-s1")


@given(st.integers(1, 512), st.integers(1, 64))
def test_accumulation_makes_up_the_global_batch_or_lists_the_sizes_that_do(batch: int, ranks: int) -> None:
    recipe = _with_train(global_batch=batch)
    if batch % ranks == 0:
        micro, steps = accumulation(recipe.train, ranks)
        assert (micro * steps * ranks, steps) == (batch, 1)
    else:
        with pytest.raises(UserError) as caught:
            accumulation(recipe.train, ranks)
        sizes = str(caught.value).split("start ")[1].split(" ranks")[0].split(", ")
        assert all(batch % int(size) == 0 for size in sizes)
        assert len(sizes) == sum(batch % size == 0 for size in range(1, batch + 1))


def test_a_micro_batch_leads_to_accumulation() -> None:
    assert accumulation(_with_train(global_batch=16, micro_batch=2).train, 2) == (2, 4)
    with pytest.raises(
        UserError, match=r"16 ranks do not divide.*micro batches of 2; .* 8 ranks, set train.micro_batch to 1 or"
    ):
        accumulation(_with_train(global_batch=16, micro_batch=2).train, 16)


@pytest.mark.parametrize("name", ["zero0", "zero2", "zero3", "zero3_offload", "zero3_multinode"])
def test_deepspeed_accepts_every_shipped_configuration(name: str) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    recipe = _with_train(global_batch=16, micro_batch=2, clip=0.5, deepspeed=f"ds_configs/{name}.json")
    config = DeepSpeedConfig(deepspeed_config(recipe.train, recipe.model.dtype, 1))
    assert (config.train_batch_size, config.gradient_accumulation_steps) == (16, 8)
    assert config.gradient_clipping == 0.5
    assert config.zero_config.stage == int(name[4])


def test_precision_comes_from_the_model() -> None:
    recipe = _with_train()
    bf16 = recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": "bfloat16"})})
    assert deepspeed_config(recipe.train, recipe.model.dtype, 1)["bf16"] == {"enabled": False}
    assert deepspeed_config(bf16.train, bf16.model.dtype, 1)["bf16"] == {"enabled": True}


@pytest.mark.parametrize("key", RECIPE_OWNS)
def test_what_belongs_to_the_recipe_is_refused_in_the_deepspeed_file(key: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({key: {}}))
    with pytest.raises(UserError, match=f"sets {key}, which belongs to the recipe"):
        deepspeed_config(_with_train(deepspeed=str(path)).train, "float32", 1)


@pytest.mark.parametrize(("content", "words"), [("{", "is not JSON"), ("[]", "expected a JSON object")])
def test_a_damaged_deepspeed_file_is_refused(content: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(content)
    with pytest.raises(UserError, match=words):
        deepspeed_config(_with_train(deepspeed=str(path)).train, "float32", 1)


def test_an_unknown_deepspeed_file_gets_the_nearest() -> None:
    with pytest.raises(UserError, match=r"zero33\.json.*Did you mean 'ds_configs/zero3\.json'\?"):
        deepspeed_config(_with_train(deepspeed="ds_configs/zero33.json").train, "float32", 1)


def test_project_files_are_found_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Path(locate("ds_configs/zero3.json")).is_file()
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / "ds_configs" / "zero3.json").touch()
    assert locate("ds_configs/zero3.json") == "ds_configs/zero3.json"
    assert locate("some-org/some-model") == "some-org/some-model"


def test_nearest_is_silent_when_nothing_is_near() -> None:
    assert nearest("zebra", ["nano", "coin"]) == ""
    assert nearest("NANO", ["nano", "coin"]) == " Did you mean 'nano'?"
    assert nearest("lr", ["lr_prompt", "steps"]) == " Did you mean 'lr_prompt'?"


def _with_train(**train) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "small",
            "data": {"source": "coin", "root": "coin", "tasks": [{"name": "A"}]},
            "model": {"path": "model"},
            "keys": {"path": "clip"},
            "train": {"lr_prompt": 1e-2, "lr_head": 1e-3, **train},
        }
    )


def test_a_gate_that_is_changed_leaves_the_stages_before_it_theirs() -> None:
    method = ModalPromptOptions(gate=0.1)
    changed = method.changed({"gate": 0.05}, stages=6)
    assert [changed.after(stages).gate for stages in (1, 6, 7, 9)] == [0.1, 0.1, 0.05, 0.05]
    again = changed.changed({"gate": None}, stages=6).changed({"gate": 0.2}, stages=7)
    assert [again.after(stages).gate for stages in (6, 7, 8)] == [0.1, None, 0.2]
    assert method.changed({"gate": 0.1}, stages=6) == method and again.after(8).earlier_gates == ()
    assert method_options(again.model_dump(mode="json")) == again


def bounds(method: ModalPromptOptions, stages: int) -> tuple[float | None, float | None]:
    then = method.after(stages)
    return then.gate, then.share


def test_a_share_takes_the_place_of_a_gate_and_earlier_stages_keep_theirs() -> None:
    method = ModalPromptOptions(gate=0.1).changed({"share": 0.6}, stages=6)
    assert [bounds(method, stages) for stages in (6, 7)] == [(0.1, None), (None, 0.6)]
    back = method.changed({"gate": 0.2}, stages=8)
    assert [bounds(back, stages) for stages in (6, 8, 9)] == [(0.1, None), (None, 0.6), (0.2, None)]
    assert method.changed({"share": 0.6}, stages=7) == method
    assert method_options(back.model_dump(mode="json")) == back
    with pytest.raises(UserError, match="--gate and --share are given; expected gate or share"):
        method.changed({"gate": 0.1, "share": 0.5}, stages=7)


def test_what_a_method_does_not_have_does_not_change() -> None:
    assert method_options(name="independent").changed({}, 3) == method_options(name="independent")
    with pytest.raises(UserError, match="the method independent has no share"):
        method_options(name="independent").changed({"share": 0.5}, 3)
