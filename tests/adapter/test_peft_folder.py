"""Sets in PEFT's prompt tuning give the logits that they give here; what PEFT cannot express is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from pipeline.adapter.answering import Question
from pipeline.adapter.format import read_adapter
from pipeline.adapter.load import load_adapter
from pipeline.adapter.peft_folder import COMPARED, CONFIG, TENSOR, WEIGHTS, export_peft, from_peft
from pipeline.adapter.vocabulary.export import ROUTER, export_checkpoint
from pipeline.adapter.vocabulary.lora import LORAS
from pipeline.cli.commands import app
from pipeline.errors import EXIT_OK, EXIT_USER, UserError
from tests.adapter.vocabulary import inputs_of, loaded, run_logits
from tests.adapters import LENGTH, Models, question, save_adapter, save_models
from tests.backbones.tiny_families import FAMILIES
from tests.serve.front.test_loras import save_lora_adapter

ASKED = [question(0), question(1, with_image=False)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, models: Models) -> Path:
    return save_adapter(tmp_path_factory.mktemp("adapters") / "adapter", models)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, adapter: Path) -> Path:
    target = tmp_path_factory.mktemp("peft") / "sets"
    made = export_peft(adapter, target)
    assert made["sets"] == ["T0", "T1", "T2"] and made["virtual_tokens"] == LENGTH + 1
    return target


@torch.no_grad()
def require_equal_logits(adapter: Path, folders: Path, base: Path, asked: list[Question]) -> None:
    ours = load_adapter(adapter)
    for number in (0, 1):
        theirs = PeftModel.from_pretrained(loaded(base)[0], folders / f"T{number}")
        for one in asked:
            example = ours.tokenise(one).example
            rest = torch.tensor([example.prompt[1:]])
            found = theirs(input_ids=rest, attention_mask=torch.ones_like(rest), **(example.images or {})).logits[0]
            expected = run_logits(ours, one, [number])
            assert len(found) == len(expected) == LENGTH + len(example.prompt)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
            assert not torch.allclose(found[-1], run_logits(ours, one, [])[-1], atol=1e-3)


def test_logits_under_peft_are_those_of_the_adapter(adapter: Path, folders: Path, models: Models) -> None:
    require_equal_logits(adapter, folders, models.llava, ASKED)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in COMPARED])
def test_another_architecture_is_refused(family: str, models: Models, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    other = save_adapter(tmp_path / "adapter", Models(FAMILIES[family](tmp_path / "base"), models.clip))
    with pytest.raises(UserError, match=r"is of type \w+, whose decoder needs more than PEFT's prompt tuning"):
        export_peft(other, tmp_path / "peft")


def test_a_set_comes_back_as_it_went(adapter: Path, folders: Path, tmp_path: Path) -> None:
    made = from_peft(adapter, "T1", folders / "T0", tmp_path / "new")
    before, after = read_adapter(adapter).pool, read_adapter(tmp_path / "new").pool
    assert made["sets"] == before.names
    assert torch.equal(after.prompts, before.prompts[[0, 0, 2]])
    assert torch.equal(after.prototypes, before.prototypes)  # what routes stays as it is
    assert read_adapter(tmp_path / "new").meta.scores == {"T0": 50.0, "T2": 50.0}


def test_what_peft_saves_after_training_is_read(adapter: Path, folders: Path, models: Models, tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(loaded(models.llava)[0], folders / "T0")
    with torch.no_grad():
        next(model.prompt_encoder["default"].parameters())[1:] += 0.5
    model.save_pretrained(tmp_path / "trained")
    from_peft(adapter, "T0", tmp_path / "trained", tmp_path / "new")
    before, after = read_adapter(adapter).pool.prompts, read_adapter(tmp_path / "new").pool.prompts
    torch.testing.assert_close(after[0], before[0] + 0.5)
    require_equal_logits(tmp_path / "new", _exported(tmp_path / "new"), models.llava, ASKED[:1])


def _exported(adapter: Path) -> Path:
    export_peft(adapter, adapter.with_name("again"))
    return adapter.with_name("again")


def test_vectors_before_the_first_token_are_refused(adapter: Path, models: Models, tmp_path: Path) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH + 1)
    get_peft_model(loaded(models.llava)[0], config).save_pretrained(tmp_path / "own")
    with pytest.raises(UserError, match=r"The first vector of .* is not the embedding of the first token \(1\)"):
        from_peft(adapter, "T0", tmp_path / "own", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        ({"insertion": "after_image"}, r"stand after image \(method.insertion\)"),
        ({"insertion": "before_image"}, r"stand before image \(method.insertion\)"),
    ],
)
def test_sets_that_stand_elsewhere_are_refused(
    models: Models, tmp_path: Path, method: dict[str, Any], sentence: str
) -> None:
    other = save_adapter(tmp_path / "adapter", models, **method)
    with pytest.raises(UserError, match=sentence):
        export_peft(other, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def test_what_is_no_folder_of_prompt_tuning_is_refused(adapter: Path, folders: Path, tmp_path: Path) -> None:
    config, vectors = json.loads((folders / "T0" / CONFIG).read_text()), load_file(folders / "T0" / WEIGHTS)[TENSOR]
    broken = vectors.clone()
    broken[2, 0] = float("nan")
    cases = {
        "is PEFT's LORA; expected PROMPT_TUNING": ({**config, "peft_type": "LORA"}, {TENSOR: vectors}),
        "has 3 vectors of width 32; expected 4": (config, {TENSOR: vectors[:3].contiguous()}),
        "has no finite matrix": (config, {TENSOR: broken}),
        "has no finite matrix 'prompt_embeddings'": (config, {"other": vectors}),
    }
    for number, (sentence, (settings, tensors)) in enumerate(cases.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / CONFIG).write_text(json.dumps(settings))
        save_file(tensors, folder / WEIGHTS)
        with pytest.raises(UserError, match=sentence):
            from_peft(adapter, "T0", folder, tmp_path / "new")
    with pytest.raises(UserError, match="cannot be read as an adapter of PEFT"):
        from_peft(adapter, "T0", tmp_path, tmp_path / "new")
    with pytest.raises(UserError, match="has no set 'T9'; expected one of T0, T1, T2"):
        from_peft(adapter, "T9", folders / "T0", tmp_path / "new")


@torch.no_grad()
def test_low_rank_updates_under_peft_answer_as_the_adapter(models: Models, tmp_path: Path) -> None:
    adapter, checkpoint = save_lora_adapter(tmp_path / "adapter", models), tmp_path / "checkpoint"
    export_checkpoint(adapter, checkpoint, "lora")
    names = json.loads((checkpoint / ROUTER).read_text())["loras"]
    ours = load_adapter(adapter)
    for number in (0, 1):
        asked = question(number)
        model, processor = loaded(checkpoint)
        theirs = PeftModel.from_pretrained(model, checkpoint / LORAS / names[f"T{number}"])
        inputs = inputs_of(processor, asked, [])
        tokens = theirs.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)
        found = processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        (answer,) = ours.answer([asked], 6)
        assert answer.selected == [f"T{number}"] and found == answer.text


def test_the_verbs_write_and_read_the_folders(adapter: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["export", str(adapter), str(tmp_path / "peft"), "--as", "peft"])
    assert done.exit_code == EXIT_OK, done.output
    arguments = [str(adapter), "T0", str(tmp_path / "peft" / "T0"), "--into", str(tmp_path / "new")]
    assert CliRunner().invoke(app, ["from-peft", *arguments]).exit_code == EXIT_OK
    done = CliRunner().invoke(app, ["export", str(adapter), str(tmp_path / "peft"), "--as", "peft"])
    assert done.exit_code == EXIT_USER and "is not empty" in " ".join(done.stderr.split())
