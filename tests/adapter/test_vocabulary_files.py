"""`export --as vocabulary`: files that are linked, copied and rewritten, precisions, images, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from data_prep.nano.example import write_example
from pipeline.adapter.answering import Question
from pipeline.adapter.format import Adapter, read_adapter, write_adapter
from pipeline.adapter.load import load_adapter
from pipeline.adapter.vocabulary import files, tables
from pipeline.adapter.vocabulary.export import export_checkpoint
from pipeline.cli.commands import app
from pipeline.config.method import method_options
from pipeline.config.models import ModelConfig
from pipeline.config.paths import PROJECT
from pipeline.errors import EXIT_OK, EXIT_USER, UserError
from pipeline.prompts.parts.projector import shared_projector
from pipeline.prompts.pool import PromptPool
from tests import tiny, tiny_clip
from tests.adapter.vocabulary import inputs_of, loaded, photo, read_json, run_logits
from tests.adapters import Models, save_adapter
from tests.backbones.tiny_families import FAMILIES

INDEX = "model.safetensors.index.json"
ASKED = Question("how many stripes?", photo(70, 33))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip.save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA in shards of 100 kB with an output layer of its own."""
    from transformers import AutoModelForImageTextToText

    folder = tiny.save_llava(tmp_path_factory.mktemp("base"))
    model: Any = AutoModelForImageTextToText.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100kB")
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, base: Path, clip: Path) -> Path:
    return save_adapter(tmp_path_factory.mktemp("adapter") / "adapter", Models(base, clip))


def changed(adapter: Path, folder: Path, **changes: Any) -> Path:
    """The adapter with other fields."""
    read = read_adapter(adapter)
    write_adapter(Adapter(read.meta.model_copy(update=changes), read.pool), folder)
    return folder


def require_same(adapter: Path, checkpoint: Path, asked: Question = ASKED, dtype: torch.dtype = torch.float32) -> None:
    """The checkpoint's scores are the run's."""
    model, processor = loaded(checkpoint, dtype)
    with torch.no_grad():
        logits = model(**inputs_of(processor, asked, ["T1"])).logits[0].float()
    expected = run_logits(load_adapter(adapter), asked, [1])
    assert len(logits) == len(expected)
    torch.testing.assert_close(logits[:, : expected.shape[1]], expected, atol=1e-5, rtol=1e-5)


def test_shards_without_a_table_are_linked_and_the_index_names_all(adapter: Path, base: Path, tmp_path: Path) -> None:
    done = export_checkpoint(adapter, tmp_path / "checkpoint")
    before, after = (read_json(folder / INDEX) for folder in (base, tmp_path / "checkpoint"))
    assert before["weight_map"].keys() == after["weight_map"].keys()
    where = {name: file for name, file in after["weight_map"].items()}
    rewritten = {before["weight_map"][name] for name in where if where[name].startswith("model-vocabulary")}
    whole = {*before["weight_map"].values()} - rewritten
    assert whole and done["linked_bytes"] == sum((base / name).stat().st_size for name in whole)
    for name in whole:
        assert (tmp_path / "checkpoint" / name).samefile(base / name)
    sizes = 0
    for file in {*where.values()}:
        with safe_open(str(tmp_path / "checkpoint" / file), framework="pt") as shard:
            held = set(shard.keys())
        assert held == {name for name in where if where[name] == file}  # a second table would be loaded too
        sizes += sum(tensor.nbytes for tensor in load_file(tmp_path / "checkpoint" / file).values())
    assert after["metadata"]["total_size"] == sizes
    old = {name: tensor for path in base.glob("*.safetensors") for name, tensor in load_file(path).items()}
    for name, file in where.items():
        if not file.startswith("model-vocabulary"):
            assert torch.equal(load_file(tmp_path / "checkpoint" / file)[name], old[name])
    require_same(adapter, tmp_path / "checkpoint")


@pytest.mark.parametrize("why", ["told", "another file system"])
def test_files_are_copied_where_they_are_not_linked(
    adapter: Path, base: Path, tmp_path: Path, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    done = export_checkpoint(adapter, tmp_path / "checkpoint", link=why != "told")
    assert done["linked_bytes"] == 0
    for path in base.glob("*.safetensors"):
        copied = tmp_path / "checkpoint" / path.name
        assert not copied.exists() or not copied.samefile(path)
    require_same(adapter, tmp_path / "checkpoint")


def test_names_of_older_checkpoints_are_kept(clip: Path, tmp_path: Path) -> None:
    """Hub checkpoints of LLaVA have the language model's tensors under `language_model.model`."""
    base = tiny.save_llava(tmp_path / "base", tied=True)
    tensors = load_file(base / "model.safetensors")
    renamed = {
        name.replace("model.language_model.", "language_model.model.").replace(
            "model.vision_tower.", "vision_tower."
        ): (value)
        for name, value in tensors.items()
    }
    renamed = {name.replace("model.multi_modal", "multi_modal"): value for name, value in renamed.items()}
    save_file(renamed, base / "model.safetensors", metadata={"format": "pt"})
    adapter = save_adapter(tmp_path / "adapter", Models(base, clip))
    export_checkpoint(adapter, tmp_path / "checkpoint")
    assert "language_model.lm_head.weight" in read_json(tmp_path / "checkpoint" / INDEX)["weight_map"]
    require_same(adapter, tmp_path / "checkpoint")


def test_vectors_keep_the_precision_of_the_run(clip: Path, tmp_path: Path) -> None:
    """Weights stored in float16 are float32 in a run that says so, and so are the tables, whatever loads them."""
    from transformers import AutoModelForImageTextToText

    base = tiny.save_llava(tmp_path / "base")
    half: Any = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float16)
    half.save_pretrained(base)
    adapter = save_adapter(tmp_path / "adapter", Models(base, clip))
    export_checkpoint(adapter, tmp_path / "checkpoint")
    model: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "checkpoint", dtype="auto")
    assert model.dtype == torch.float32
    first = read_json(tmp_path / "checkpoint" / "prompt_sets.json")["sets"]["T0"][0]
    assert torch.equal(model.get_input_embeddings().weight[first], load_adapter(adapter).pool.prompts[0, 0])
    require_same(adapter, tmp_path / "checkpoint")


def test_llavas_own_conversation_padding_and_precision_are_written(clip: Path, base: Path, tmp_path: Path) -> None:
    """As the recipes of LLaVA-1.5-7B have them: bfloat16, vicuna_v1 and images padded to squares."""
    plain = save_adapter(tmp_path / "plain", Models(base, clip))
    model = ModelConfig(path=str(base), dtype="bfloat16", template="vicuna_v1", image_padding="square", max_length=512)
    adapter = changed(plain, tmp_path / "adapter", model=model)
    export_checkpoint(adapter, tmp_path / "checkpoint")
    assert read_json(tmp_path / "checkpoint" / "config.json")["dtype"] == "bfloat16"
    _, processor = loaded(tmp_path / "checkpoint")
    question = Question("how many stripes?", photo(70, 33))
    found = inputs_of(processor, question, [])
    run = load_adapter(adapter)
    expected = run.route([question]).examples[0]
    assert found["input_ids"][0].tolist() == expected.prompt
    assert expected.images is not None and torch.equal(found["pixel_values"], expected.images["pixel_values"])
    turns = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))
    ]
    text = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert text == "<s>" + run.lmm.conversation._text(["a", "c"], False, "b")


@pytest.mark.parametrize(("family", "tokens"), [("qwen2_5_vl", 8), ("llava_next", 60)])
def test_a_limit_on_the_tokens_of_images_is_written(clip: Path, tmp_path: Path, family: str, tokens: int) -> None:
    base = tmp_path / "base"
    base.mkdir()
    plain = save_adapter(tmp_path / "plain", Models(FAMILIES[family](base), clip))
    model = read_adapter(plain).meta.model
    adapter = changed(plain, tmp_path / "adapter", model=model.model_copy(update={"image_tokens": tokens}))
    export_checkpoint(adapter, tmp_path / "checkpoint")
    require_same(adapter, tmp_path / "checkpoint", Question("what is it?", photo(200, 150)))


def test_the_embedded_model_generates_the_answers_of_the_run(tmp_path: Path) -> None:
    """Its weights are stored in float16 with a tied output layer, and its table has no spare row."""
    nano = PROJECT / "data_prep" / "nano" / "checkpoints"
    plain = read_adapter(save_adapter(tmp_path / "plain", Models(nano / "llava", nano / "clip")))
    weights = load_file(nano / "llava" / "model.safetensors")
    table = next(value for name, value in weights.items() if name.endswith("embed_tokens.weight")).float()
    words = torch.randint(100, len(table), (3, 4), generator=torch.Generator().manual_seed(1))
    plain.pool.tensors["prompt"] = 1.5 * table[words]
    write_adapter(plain, tmp_path / "adapter")
    assert export_checkpoint(tmp_path / "adapter", tmp_path / "checkpoint")["vocabulary"] == [832, 896]
    model, processor = loaded(tmp_path / "checkpoint")
    run = load_adapter(tmp_path / "adapter")
    questions = [line.split(",") for line in write_example(tmp_path, 8, seed=0).read_text("utf-8").splitlines()[1:]]
    pictures = next(path for path in tmp_path.iterdir() if (path / questions[0][0]).is_file())
    asked = [Question(text, (pictures / name).read_bytes()) for name, text, _ in questions]
    for question, answer in zip(asked, run.answer(asked), strict=True):
        inputs = inputs_of(processor, question, answer.selected)
        tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert answer.text and run.lmm.conversation.decode(tokens.tolist()) == answer.text


@pytest.mark.parametrize("moment", ["tables", "weights"])
def test_what_was_interrupted_leaves_nothing(
    adapter: Path, tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if moment == "tables":
        monkeypatch.setattr(tables, "save_file", full)
    else:
        monkeypatch.setattr(files.shutil, "copyfile", full)
    with pytest.raises(UserError, match=r"could not be written .*No space left"):
        export_checkpoint(adapter, tmp_path / "out" / "checkpoint", link=False)
    assert not any((tmp_path / "out").iterdir())


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "free_space", lambda _: 1000)
    with pytest.raises(UserError, match=r"needs 0.1 GB of disk, and 0.0 GB are free"):
        export_checkpoint(adapter, tmp_path / "out" / "checkpoint")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_files_is_refused(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is not empty"):
        export_checkpoint(adapter, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_modules_that_are_no_rows_are_refused(adapter: Path, base: Path, clip: Path, tmp_path: Path) -> None:
    weighted = save_adapter(tmp_path / "weighted", Models(base, clip), selection="soft", gate=None)
    with pytest.raises(UserError, match=r"modalprompt .* multiplies prompt sets by weights"):
        export_checkpoint(weighted, tmp_path / "out")
    read = read_adapter(adapter)
    lora = Adapter(read.meta.model_copy(update={"method": method_options(name="task_lora")}), low_rank(read.pool))
    write_adapter(lora, tmp_path / "lora")
    with pytest.raises(UserError, match=r"modules of the part low_rank .* with --as adapter, writes them"):
        export_checkpoint(tmp_path / "lora", tmp_path / "out")
    projected = Adapter(read.meta.model_copy(update={"projector": "trained"}), replace(read.pool))
    projected.pool.shared = shared_projector({"linear_1.weight": torch.zeros(2, 2)})
    write_adapter(projected, tmp_path / "projected")
    with pytest.raises(UserError, match="learned the image projector too"):
        export_checkpoint(tmp_path / "projected", tmp_path / "out")


def low_rank(pool: PromptPool) -> PromptPool:
    """A pool of low-rank updates of one layer with the states of another pool."""
    name = "layers.0.self_attn.q_proj"
    tensors = {
        f"low_rank.{name}.a": torch.zeros(len(pool), 2, tiny.HIDDEN),
        f"low_rank.{name}.b": torch.zeros(len(pool), tiny.HIDDEN, 2),
    }
    return PromptPool(list(pool.names), tensors, pool.states)


def test_other_models_are_refused(adapter: Path, base: Path, clip: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.path is .*neither a folder here"):
        export_checkpoint(adapter, tmp_path / "out", model=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="belongs to another base model"):
        export_checkpoint(adapter, tmp_path / "out", model=str(tiny.save_llava(tmp_path / "other", seed=9)))
    shutil.copytree(base, tmp_path / "moved")
    assert export_checkpoint(adapter, tmp_path / "out", model=str(tmp_path / "moved"))["sets"] == ["T0", "T1", "T2"]
    again = save_adapter(tmp_path / "again", Models(tmp_path / "out", clip))
    with pytest.raises(UserError, match="has prompt sets already"):
        export_checkpoint(again, tmp_path / "twice")


def test_sets_of_another_width_are_refused(adapter: Path, tmp_path: Path) -> None:
    read = read_adapter(adapter)
    read.pool.tensors["prompt"] = torch.zeros(3, 2, tiny.HIDDEN + 1)
    write_adapter(read, tmp_path / "wide")
    with pytest.raises(UserError, match=f"are {tiny.HIDDEN + 1} wide and the model .* {tiny.HIDDEN}"):
        export_checkpoint(tmp_path / "wide", tmp_path / "out")


def test_the_verb_writes_it_and_says_what(adapter: Path, tmp_path: Path) -> None:
    def call(*options: str) -> Any:
        return CliRunner().invoke(app, ["export", str(adapter), str(tmp_path / "out"), *options])

    done = call("--as", "vocabulary", "--licence", "cc-by-4.0", "--json")
    assert done.exit_code == EXIT_OK, done.output
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["tokens"] == 9 and told["vocabulary"] == [260, 320]
    assert "license: cc-by-4.0" in (tmp_path / "out" / "README.md").read_text()
    assert read_adapter(tmp_path / "out" / "adapter").meta.licence == "cc-by-4.0"
    assert call("--as", "vocabulary").exit_code == EXIT_USER
    assert call("--as", "vocabulary", "--push", "me/x").exit_code == EXIT_USER
    assert call("--copy").exit_code == EXIT_USER
