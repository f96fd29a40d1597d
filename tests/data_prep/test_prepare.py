from __future__ import annotations

import json
import resource
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open

from data_prep import key_processes
from data_prep import keys as keys_module
from data_prep.__main__ import main
from data_prep.parallel import ordered_map
from data_prep.prepare import prepare
from data_prep.verify import verify_all, verify_split
from pipeline.backbones.clip import KeyEncoder, key_identity
from pipeline.config.load import load_recipe
from pipeline.data.sample import decode_image
from pipeline.data.shards import IndexedShards
from pipeline.errors import PipelineError, UserError
from tests.tiny_clip import save_coin


def _train(recipe) -> IndexedShards:
    return IndexedShards(recipe.data.split_path("Shapes", "train"))


@pytest.fixture
def prepared(recipe):
    built = recipe()
    prepare(built, progress=False)
    return built


def test_every_split_is_written_with_keys_and_verified(prepared):
    assert len(verify_all(Path(prepared.data.prepared))) == 2
    assert len(_train(prepared)) == 7
    assert len(IndexedShards(prepared.data.split_path("Shapes", "test"))) == 5


def test_what_was_written_is_read_back_before_it_counts_as_prepared(recipe, monkeypatch):
    def damage(path, ids, keys, metadata, write=keys_module._write_table):
        write(path, ids[::-1], keys, metadata)

    monkeypatch.setattr(keys_module, "_write_table", damage)
    with pytest.raises(UserError, match="lists other samples than the index"):
        prepare(recipe(), progress=False)


@pytest.mark.parametrize("feature", ["projected", "pooled"])
def test_keys_are_those_of_image_and_question_in_index_order(recipe, feature):
    built = recipe(keys={"text_feature": feature})
    prepare(built, progress=False)
    shards, encoder = _train(built), KeyEncoder(built.keys.path, text_feature=feature)
    keys = shards.keys(encoder.identity())
    assert keys.image.dtype == keys.text.dtype == torch.float16
    for row, sample in enumerate(shards):
        picture = sample.picture()
        assert bool(keys.has_image[row]) == (picture is not None)
        image = torch.zeros(encoder.width) if picture is None else encoder.image([picture])[0]
        torch.testing.assert_close(keys.image[row].float(), image, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(keys.text[row].float(), encoder.text([sample.question])[0], atol=2e-3, rtol=2e-3)


def test_text_only_samples_have_a_zero_image_key(prepared):
    keys = _train(prepared).keys()
    assert keys.has_image.tolist() == [True, True, True, False, True, True, True]
    assert not keys.image[3].any()
    assert keys.image[:3].any(dim=1).all()


def test_keys_are_kept_as_float16_with_their_origin(prepared):
    with safe_open(_train(prepared).folder / "keys.safetensors", "pt") as file:
        assert file.get_tensor("image").dtype == file.get_tensor("text").dtype == torch.float16
        metadata = file.metadata()
    assert metadata.items() >= key_identity(prepared.keys.path).items()
    assert metadata["dataset_fingerprint"] == _train(prepared).fingerprint


def test_the_table_for_analysis_holds_the_same_keys_with_ids(prepared):
    shards = _train(prepared)
    table = pq.read_table(shards.folder / "keys.parquet")
    assert table["id"].to_pylist() == shards.ids
    assert torch.tensor(table["text"].to_pylist()).equal(shards.keys().text)
    assert torch.tensor(table["image"].to_pylist()).equal(shards.keys().image)


def test_a_second_prepare_changes_no_file_and_loads_no_clip(prepared, monkeypatch):
    files = {path: path.stat().st_mtime_ns for path in Path(prepared.data.prepared).rglob("*")}
    monkeypatch.setattr("data_prep.keys.key_encoder", None)
    assert [split["wrote"] for split in prepare(prepared, progress=False)["splits"]] == [[], []]
    assert files == {path: path.stat().st_mtime_ns for path in Path(prepared.data.prepared).rglob("*")}


def test_an_interrupted_key_run_goes_on_at_the_first_shard_without_keys(prepared, monkeypatch):
    folder = _train(prepared).folder
    whole = _train(prepared).keys()
    (folder / "keys.safetensors").unlink()
    encode, calls = keys_module._encode, []

    def counting(shards, rows, *others):
        calls.append(rows.start)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(shards, rows, *others)

    monkeypatch.setattr(keys_module, "_encode", counting)
    with pytest.raises(KeyboardInterrupt):
        prepare(prepared, progress=False)
    assert prepare(prepared, progress=False)["splits"][0]["wrote"] == ["keys"]
    assert calls == [0, 3, 6, 6]
    assert torch.equal(_train(prepared).keys().image, whole.image)
    assert torch.equal(_train(prepared).keys().text, whole.text)
    assert not (folder / "keys-parts").exists()


def test_an_interrupted_key_run_of_another_clip_is_not_continued(recipe, other_clip, monkeypatch):
    encode, calls = keys_module._encode, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(*arguments)

    monkeypatch.setattr(keys_module, "_encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(recipe(), progress=False)
    built = recipe(keys={"path": str(other_clip)})
    prepare(built, progress=False)
    first = decode_image(_train(built)[0].image or b"")
    torch.testing.assert_close(
        _train(built).keys().image[0].float(), KeyEncoder(other_clip).image([first])[0], atol=2e-3, rtol=2e-3
    )


def test_an_image_and_a_question_that_occur_often_are_encoded_once(recipe, tmp_path, monkeypatch):
    root = save_coin(tmp_path / "coin", train=7, test=7)
    instructions = root / "instructions" / "Shapes"
    train = json.loads((instructions / "train.json").read_text())
    for entry in train:
        entry["image"] = "images/Shapes-test-1.png"
    (instructions / "train.json").write_text(json.dumps(train))
    seen = {"image": 0, "text": 0}
    for name in seen:
        method = getattr(KeyEncoder, name)

        def counting(self, items, name=name, method=method):
            seen[name] += len(items)
            return method(self, items)

        monkeypatch.setattr(KeyEncoder, name, counting)
    prepare(recipe(shard_samples=100), progress=False)
    assert seen == {"image": 6, "text": 6}  # test-1 once for both splits; three questions per split


def test_keys_of_another_clip_are_refused_and_computed_anew(recipe, prepared, other_clip):
    expected = key_identity(other_clip)
    advice = r"come from another CLIP: weights_sha256 is .*data\.prepared .*python -m pipeline prepare.* `--replace`"
    with pytest.raises(UserError, match=advice):
        _train(prepared).keys(expected)
    built = recipe(keys={"path": str(other_clip)})
    with pytest.raises(UserError, match=r"has the keys of another CLIP .*--replace"):
        prepare(built, progress=False)
    wrote = [split["wrote"] for split in prepare(built, progress=False, replace=True)["splits"]]
    assert wrote == [["shards", "keys"], ["shards", "keys"]]
    assert _train(built).keys(expected).identity["weights_sha256"] == expected["weights_sha256"]


def test_keys_of_another_text_feature_are_refused(prepared):
    with pytest.raises(UserError, match=r"text_feature is projected .* has pooled"):
        _train(prepared).keys(key_identity(prepared.keys.path, None, "pooled"))


def test_keys_of_the_other_truncation_are_refused_and_computed_anew(recipe, prepared):
    built = recipe(keys={"text_truncation": "tail"})
    with pytest.raises(UserError, match=r"keep the head of long questions, keys\.text_truncation says tail"):
        _train(prepared).keys(key_identity(*built.keys.source))
    prepare(built, progress=False, replace=True)
    assert _train(built).keys(key_identity(*built.keys.source)).identity["text_truncation"] == "tail"


def test_keys_of_another_dataset_are_refused(prepared):
    test = prepared.data.split_path("Shapes", "test")
    shutil.copy(test / "keys.safetensors", _train(prepared).folder)
    with pytest.raises(UserError, match=r"keys\.safetensors were computed for another dataset.*prepare RECIPE"):
        _train(prepared).keys()


@pytest.mark.parametrize(("size", "sentence"), [(None, "are missing"), (50, "cannot be read"), (0, "cannot be read")])
def test_missing_or_damaged_keys_are_refused(prepared, size, sentence):
    path = _train(prepared).folder / "keys.safetensors"
    content = path.read_bytes()
    path.unlink()
    if size is not None:
        path.write_bytes(content[:size])
    with pytest.raises(UserError, match=rf"keys\.safetensors {sentence}.*prepare RECIPE"):
        _train(prepared).keys()


def test_limits_are_applied_and_changing_them_writes_anew_where_that_is_said(recipe, prepared):
    built = recipe(tasks=[{"name": "Shapes", "limit_train": 4, "limit_test": 5}])
    splits = prepare(built, progress=False, replace=True)["splits"]
    assert [(split["samples"], split["wrote"]) for split in splits] == [
        (4, ["shards", "keys"]),
        (5, ["shards", "keys"]),
    ]
    assert verify_all(Path(built.data.prepared))


def test_verify_notices_one_changed_byte_in_a_shard(prepared):
    shard = _train(prepared).folder / "shard-000001.tar"
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"shard-000001\.tar has content .* it was changed"):
        verify_split(_train(prepared).folder)


def test_verify_notices_a_table_of_another_dataset(prepared):
    test = prepared.data.split_path("Shapes", "test")
    shutil.copy(test / "keys.parquet", _train(prepared).folder)
    with pytest.raises(UserError, match=r"keys\.parquet was computed for another dataset"):
        verify_split(_train(prepared).folder)


def test_verify_of_a_folder_without_data_says_so(tmp_path):
    with pytest.raises(UserError, match="holds no prepared data"):
        verify_all(tmp_path)


def test_a_clip_that_yields_no_finite_keys_is_refused(recipe, monkeypatch):
    monkeypatch.setattr(KeyEncoder, "text", lambda self, texts: torch.full((len(texts), self.width), torch.nan))
    with pytest.raises(UserError, match="no finite text key for sample 'Shapes-0'"):
        prepare(recipe(), progress=False)


def test_generated_tasks_travel_the_same_road(recipe, tmp_path):
    from data_prep.nano.tasks import TASKS

    tasks = [{"name": name, "limit_train": 3, "limit_test": 2} for name in TASKS[:2]]
    built = recipe(source="generated", root=str(tmp_path / "drawn"), tasks=tasks)
    splits = prepare(built, progress=False)["splits"]
    assert [split["samples"] for split in splits] == [3, 2, 3, 2]
    assert not any(split["wrote"] for split in prepare(built, progress=False)["splits"])


def _command_line(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["data_prep", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_the_command_line_verifies_what_it_prepared(recipe, tmp_path, monkeypatch, capsys):
    recipe().dump_yaml(tmp_path / "tiny.yaml")
    assert _command_line(monkeypatch, "prepare", str(tmp_path / "tiny.yaml"), "--set", "data.shard_samples=4") == 0
    assert "Shapes/train: 7 samples in 2 shards, wrote shards and keys" in capsys.readouterr().out
    assert _command_line(monkeypatch, "verify", str(tmp_path / "prepared")) == 0
    assert capsys.readouterr().out.count("whole") == 2


def test_the_command_line_ends_wrong_input_with_one_sentence_and_exit_code_2(prepared, monkeypatch, capsys):
    (_train(prepared).folder / "shard-000000.tar").unlink()
    assert _command_line(monkeypatch, "verify", prepared.data.prepared) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith("error: The shard ")


def test_the_command_line_takes_a_home_folder_as_a_shell_would(prepared, monkeypatch, capsys):
    folder = Path(prepared.data.prepared)
    monkeypatch.setenv("HOME", str(folder.parent))
    assert _command_line(monkeypatch, "verify", f"~/{folder.name}") == 0
    monkeypatch.setenv("DATA", str(folder.parent))
    assert _command_line(monkeypatch, "verify", f"$DATA/{folder.name}") == 0
    assert capsys.readouterr().out.count("whole") == 4


def test_the_command_line_may_open_as_many_files_as_a_verb(prepared, monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        assert _command_line(monkeypatch, "verify", prepared.data.prepared) == 0
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 256
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# ---------------------------------------------------------------------- how keys are computed


def test_preprocessed_images_that_wait_are_bounded_in_bytes():
    done: list[int] = []

    def work(item: int) -> bytes:
        done.append(item)
        return bytes(100)

    most = 0
    for number, _ in enumerate(ordered_map(work, range(60), 8, most_bytes=300, size=len)):
        if number > 8:  # the first ones were under way before their size was known
            most = max(most, len(done) - number)
    assert most <= 300 // 100 + 1


def test_results_come_in_order_whatever_the_bound():
    assert list(ordered_map(lambda n: n, range(50), 4, most_bytes=1, size=lambda n: 10)) == list(range(50))


def test_keys_say_in_which_precision_they_were_computed_and_it_is_no_other_clip(prepared, monkeypatch):
    folder = _train(prepared).folder
    assert _train(prepared).keys().identity["precision"] == "float32"
    (folder / "keys.safetensors").unlink()
    monkeypatch.setattr("pipeline.backbones.clip.has_tf32", lambda device: True)
    assert prepare(prepared, progress=False)["splits"][0]["wrote"] == ["keys"]
    assert _train(prepared).keys(key_identity(prepared.keys.path)).identity["precision"] == "tf32"


def test_tf32_is_allowed_while_keys_are_computed_and_not_before_or_after(clip, monkeypatch):
    monkeypatch.setattr("pipeline.backbones.clip.has_tf32", lambda device: True)
    seen: list[str] = []
    fast, exact = KeyEncoder(clip, tf32=True), KeyEncoder(clip)
    for encoder in (fast, exact):
        tower = encoder.model.get_text_features

        def watched(tower=tower, **inputs):
            seen.append(torch.get_float32_matmul_precision())
            return tower(**inputs)

        monkeypatch.setattr(encoder.model, "get_text_features", watched)
        encoder.text(["what?"])
    assert seen == ["high", "highest"] and torch.get_float32_matmul_precision() == "highest"


def test_more_processes_than_gpus_are_refused_and_each_gets_a_device_as_it_was_given(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-aa,GPU-bb")
    assert key_processes._devices(2) == ["GPU-aa", "GPU-bb"]
    with pytest.raises(UserError, match="--gpus is 3, and 2 GPUs are visible"):
        key_processes._devices(3)


@pytest.mark.parametrize(
    ("code", "said", "kind"),
    [
        (2, "warning\nerror: data.root is wrong.", UserError),
        (1, "error: A file could not be written.", PipelineError),
        (1, "Traceback\nKeyError: 'x'", RuntimeError),
    ],
)
def test_what_ends_a_process_that_computes_keys_ends_prepare_in_the_same_way(monkeypatch, code, said, kind):
    ended = SimpleNamespace(communicate=lambda: ("", said), poll=lambda: code, returncode=code)
    monkeypatch.setattr(key_processes, "_devices", lambda _: [None])
    monkeypatch.setattr(key_processes.subprocess, "Popen", lambda *_, **__: ended)
    with pytest.raises(kind, match=said.splitlines()[-1].removeprefix("error: ")) as caught:
        key_processes.keys_by_processes(load_recipe("nano"), 1)
    assert type(caught.value) is kind


@pytest.mark.slow
def test_several_processes_compute_the_keys_of_one(recipe, prepared, tmp_path):
    shared = recipe(prepared=str(tmp_path / "shared"))
    assert [split["wrote"] for split in prepare(shared, progress=False, gpus=2)["splits"]] == [["keys"], ["keys"]]
    assert torch.equal(_train(shared).keys().image, _train(prepared).keys().image)
    assert torch.equal(_train(shared).keys().text, _train(prepared).keys().text)


@pytest.mark.slow
def test_what_a_process_cannot_use_is_one_sentence(recipe, tmp_path):
    built = recipe()
    prepare(built, progress=False)
    (_train(built).folder / "keys.safetensors").unlink()
    (_train(built).folder / "shard-000000.tar").write_bytes(b"")
    with pytest.raises(UserError, match="it is not whole"):
        key_processes.keys_by_processes(built, 2)
