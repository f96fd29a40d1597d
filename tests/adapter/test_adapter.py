"""Adapters: loaded in three lines, merged and pruned without changing an answer, and what is refused."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from pipeline.adapter.answering import Answerer
from pipeline.adapter.card import card
from pipeline.adapter.edit import merge, prune, push
from pipeline.adapter.format import Adapter, read_adapter, write_adapter
from pipeline.adapter.load import load_adapter
from pipeline.adapter.meta import META
from pipeline.cli.commands import app
from pipeline.config.method import method_options
from pipeline.errors import EXIT_OK, EXIT_USER, UserError
from pipeline.hub.weights import file_fingerprints
from tests import tiny, tiny_clip
from tests.adapters import Models, question, save_adapter, save_models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def whole(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tmp_path_factory.mktemp("whole") / "adapter", models)


def answers(answerer: Answerer, numbers: tuple[int, ...]) -> list[Any]:
    asked = [question(number, variant) for number in numbers for variant in range(4)]
    return [(answer.text, answer.selected) for answer in answerer.answer(asked)]


def test_an_adapter_answers_in_three_lines(whole: Path, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    picture.write_bytes(question(1).image or b"")
    adapter = load_adapter(str(whole))
    answer = adapter.ask(question(1).text, picture)
    assert answer.selected == ["T1"]
    assert answer.similarity.keys() == {"T0", "T1", "T2"}


def test_dropping_a_task_changes_no_token_of_the_others(whole: Path, tmp_path: Path) -> None:
    before = answers(load_adapter(whole), (0, 2))
    assert {name for _, selected in before for name in selected} == {"T0", "T2"}
    prune(whole, ["T1"], tmp_path / "pruned")
    pruned = load_adapter(tmp_path / "pruned")
    assert pruned.pool.names == ["T0", "T2"]
    assert answers(pruned, (0, 2)) == before


def test_pools_trained_apart_become_one_that_answers_as_each_did(models: Models, tmp_path: Path) -> None:
    first = save_adapter(tmp_path / "first", models, (0, 1))
    second = save_adapter(tmp_path / "second", models, (2, 3))
    before = answers(load_adapter(first), (0, 1)) + answers(load_adapter(second), (2, 3))
    merge([first, second], tmp_path / "both")
    both = load_adapter(tmp_path / "both")
    assert both.pool.names == ["T0", "T1", "T2", "T3"]
    assert answers(both, (0, 1, 2, 3)) == before


def test_merging_and_pruning_keep_every_number(models: Models, whole: Path, tmp_path: Path) -> None:
    merge([whole, save_adapter(tmp_path / "other", models, (3,))], tmp_path / "both")
    prune(tmp_path / "both", ["T3"], tmp_path / "again")
    one, two = read_adapter(whole), read_adapter(tmp_path / "again")
    assert torch.equal(one.pool.prompts, two.pool.prompts) and torch.equal(one.pool.prototypes, two.pool.prototypes)
    assert one.meta.sets == two.meta.sets


def test_what_cannot_share_a_pool_is_not_merged(models: Models, whole: Path, tmp_path: Path) -> None:
    strangers = Models(tiny.save_llava(tmp_path / "llava", seed=5), tiny_clip.save_clip(tmp_path / "clip", seed=5))
    other = save_adapter(tmp_path / "other", strangers, (3,), gate=0.5)
    with pytest.raises(UserError, match=r"another base model; another CLIP .* method.gate 0.5 instead of 0.001"):
        merge([whole, other], tmp_path / "both")
    with pytest.raises(UserError, match="T0, T1, T2 is in more than one"):
        merge([whole, whole], tmp_path / "both")
    with pytest.raises(UserError, match="at least two"):
        merge([whole], tmp_path / "both")
    assert not (tmp_path / "both").exists()


def test_adapters_are_merged_if_their_penalties_on_repeated_tokens_are_the_same(
    models: Models, whole: Path, tmp_path: Path
) -> None:
    other = save_adapter(tmp_path / "other", models, (3,))
    none = edited(other, tmp_path / "none", repetition_penalty=1.0)  # as the checkpoint's own is
    strong = edited(other, tmp_path / "strong", repetition_penalty=1.7)
    with pytest.raises(UserError, match=r"repetition_penalty 1.7 instead of 'checkpoint'"):
        merge([whole, strong], tmp_path / "both")
    merge([whole, none], tmp_path / "both")
    assert read_adapter(tmp_path / "both").meta.repetition_penalty == "checkpoint"


def test_an_adapter_of_an_earlier_version_is_loaded_and_merged(models: Models, whole: Path, tmp_path: Path) -> None:
    older = save_adapter(tmp_path / "older", models, (3,))
    meta = json.loads((older / META).read_text())
    (older / META).write_text(json.dumps({**meta, "base_model": file_fingerprints(models.llava)[0]}))
    assert load_adapter(older).ask("what?").text is not None
    merge([whole, older], tmp_path / "both")
    assert read_adapter(tmp_path / "both").meta.sets == ["T0", "T1", "T2", "T3"]


def test_pruning_names_what_it_has(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no set 't1'; .* Did you mean 'T1'"):
        prune(whole, ["t1"], tmp_path / "pruned")
    with pytest.raises(UserError, match=r"nothing of .* would be left"):
        prune(whole, ["T0", "T1", "T2"], tmp_path / "pruned")


def test_the_vectors_handed_to_another_server_give_the_same_answer(whole: Path) -> None:
    """What vLLM takes as prompt_embeds: generating from the tensor alone is generating from the question."""
    adapter, asked = load_adapter(whole), question(2)
    vectors = adapter.prompt_embeds(asked.text, asked.image)
    assert vectors.shape[1] == tiny.HIDDEN and vectors.dtype == torch.float32
    tokens = adapter.lmm.model.generate(
        inputs_embeds=vectors[None], max_new_tokens=6, do_sample=False, eos_token_id=adapter.lmm.stops
    )[0].tolist()
    assert adapter.lmm.conversation.decode(tokens) == adapter.ask(asked.text, asked.image).text
    prompts = adapter.pool.prompts[2]
    assert any(torch.equal(vectors[start : start + len(prompts)], prompts) for start in range(len(vectors)))


def test_models_elsewhere_are_named_and_others_refused(models: Models, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(models.llava, tmp_path / "moved")
    assert load_adapter(whole, model=str(tmp_path / "moved")).ask("what?").text is not None
    with pytest.raises(UserError, match="belongs to another base model"):
        load_adapter(whole, model=str(tiny.save_llava(tmp_path / "other", seed=9)))
    with pytest.raises(UserError, match="belongs to another CLIP"):
        load_adapter(whole, clip=str(tiny_clip.save_clip(tmp_path / "clip", seed=9)))


def edited(folder: Path, target: Path, **changes: Any) -> Path:
    shutil.copytree(folder, target)
    meta = json.loads((target / "adapter.json").read_text()) | changes
    (target / "adapter.json").write_text(json.dumps(meta))
    return target


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"format": 1}, "has adapter format 1, expected 2 or 3; export"),
        ({"sha256": "0" * 64}, "not the file that adapter.json describes"),
        ({"sets": ["T0"]}, "does not hold the sets"),
        ({"method": {"name": "magic"}}, "needs the method 'magic'"),
    ],
)
def test_a_damaged_adapter_is_named(whole: Path, tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        read_adapter(edited(whole, tmp_path / "damaged", **changes))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"name": "task_lora"}, "task_lora, whose part low_rank has no such tensor"),
        ({"name": "coda"}, "coda, whose part components has no such tensor"),
        ({"name": "zero_shot"}, "zero_shot, which learns nothing"),
    ],
)
def test_an_adapter_of_another_part_than_its_method_says_is_refused(
    whole: Path, tmp_path: Path, fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(
        UserError, match=f"prompts.safetensors holds 'prompt', and adapter.json names the method {said}"
    ):
        read_adapter(edited(whole, tmp_path / "other", method=fields))


def test_the_card_tells_tasks_scores_licences_and_how_to_load(whole: Path) -> None:
    text = (whole / "README.md").read_text()
    for part in ("| T1 | 50.0 |", "load_adapter", "not stated; export with --licence", "within 0.001 of the best"):
        assert part in text


def test_the_card_says_how_to_install_and_what_to_ask(whole: Path, tmp_path: Path) -> None:
    text = (whole / "README.md").read_text()
    install, use = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    assert install.splitlines()[0] == "pip install FOLDER"
    command = shlex.split(install.splitlines()[1])
    assert command[:4] == ["python", "-m", "pipeline", "predict"]
    typer.main.get_command(app).commands["predict"].make_context("predict", command[4:])  # type: ignore[attr-defined]
    names: dict[str, Any] = {}
    picture = tmp_path / "picture.png"
    picture.write_bytes(tiny.png((9, 9, 9)))
    exec(use.replace("THIS_FOLDER", str(whole)).replace("picture.png", str(picture)), names)
    assert "In place of `QUESTION` write one of your own, worded as in the training data of T0, T1, T2." in text


def test_the_card_of_a_method_that_is_told_the_task_names_one_and_of_a_quantised_model_its_extra(whole: Path) -> None:
    meta = read_adapter(whole).meta
    told = meta.model_copy(update={"method": method_options(name="independent"), "sets": ["T0", "T 1"]})
    assert 'adapter.ask("QUESTION", "picture.png", task="T0")' in card(told, (2, 3, 4))
    assert '--question "QUESTION" --task T0' in card(told, (2, 3, 4))
    assert "task=" not in card(meta, (3, 3, 4))
    small = meta.model_copy(update={"model": meta.model.model_copy(update={"quantization": "nf4"})})
    assert 'pip install "FOLDER[quantised]"' in card(small, (3, 3, 4))


def test_pushing_makes_a_private_repository_unless_told_otherwise(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    calls: list[Any] = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **options: calls.append((name, options["private"])))
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **options: calls.append(options["repo_id"]))
    assert push(whole, "me/sets") == "https://huggingface.co/me/sets"
    assert calls == [("me/sets", True), "me/sets"]


def test_a_refused_upload_is_one_sentence_without_nested_brackets(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("403 Forbidden: None. (Request ID: Root=1-2;3)\nCannot access content at: https://hub/api.")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(UserError) as raised:
        push(whole, "me/sets")
    assert str(raised.value) == (
        "me/sets could not be uploaded to: 403 Forbidden: None. (Request ID: Root=1-2;3). Expected user/name, "
        "network access, and a token with write access, from `hf auth login` or HF_TOKEN."
    )


def with_projector(whole: Path, target: Path) -> Path:
    """The adapter with a trained projector."""
    adapter = read_adapter(whole)
    meta = adapter.meta.model_copy(update={"projector": "trained"})
    adapter.pool.shared = {"projector.linear_1.weight": torch.ones(2, 2)}
    write_adapter(Adapter(meta, adapter.pool), target)
    return target


def test_a_damaged_projector_is_named(whole: Path, tmp_path: Path) -> None:
    folder = with_projector(whole, tmp_path / "adapter")
    assert read_adapter(folder).pool.shared.keys() == {"projector.linear_1.weight"}
    save_file({"linear_1.weight": torch.zeros(2, 2)}, folder / "projector.safetensors")
    with pytest.raises(UserError, match=r"projector.safetensors is missing or not the file"):
        read_adapter(folder)


def test_an_adapter_from_before_projectors_had_checksums_is_loaded(whole: Path, tmp_path: Path) -> None:
    folder = with_projector(whole, tmp_path / "adapter")
    meta = json.loads((folder / "adapter.json").read_text())
    del meta["projector_sha256"]
    (folder / "adapter.json").write_text(json.dumps(meta))
    assert read_adapter(folder).pool.shared.keys() == {"projector.linear_1.weight"}


def test_the_card_names_the_given_licence_as_a_hub_reads_it(whole: Path, tmp_path: Path) -> None:
    adapter = read_adapter(whole)
    write_adapter(Adapter(adapter.meta.model_copy(update={"licence": "cc-by-4.0"}), adapter.pool), tmp_path / "a")
    front = (tmp_path / "a" / "README.md").read_text().split("---")[1]
    assert yaml.safe_load(front)["license"] == "cc-by-4.0"


def test_the_card_says_where_the_small_model_of_this_repository_is(whole: Path, tmp_path: Path) -> None:
    adapter = read_adapter(whole)
    model = adapter.meta.model.model_copy(update={"path": "data_prep/nano/checkpoints/llava"})
    write_adapter(Adapter(adapter.meta.model_copy(update={"model": model}), adapter.pool), tmp_path / "a")
    where = "(a small model that the source of continual-prompts has in that folder)"
    assert f"`data_prep/nano/checkpoints/llava` {where}" in (tmp_path / "a" / "README.md").read_text()
    assert where not in (whole / "README.md").read_text()


def test_predict_takes_models_that_lie_elsewhere(models: Models, whole: Path, tmp_path: Path) -> None:
    moved = edited(whole, tmp_path / "moved")
    meta = json.loads((moved / "adapter.json").read_text())
    meta["model"]["path"], meta["clip"]["path"] = str(tmp_path / "gone"), str(tmp_path / "gone-clip")
    (moved / "adapter.json").write_text(json.dumps(meta))
    where = ["--model", str(models.llava), "--clip", str(models.clip)]
    done = CliRunner().invoke(app, ["predict", str(moved), "--question", "what?", *where, "--json"])
    assert done.exit_code == EXIT_OK, done.stderr
    assert "answer" in json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("question", ["", "  "])
def test_predict_refuses_an_empty_question(whole: Path, question: str) -> None:
    done = CliRunner().invoke(app, ["predict", str(whole), "--question", question])
    assert done.exit_code == EXIT_USER and "--question is empty" in done.stderr


def test_a_frame_may_hold_pictures_as_base64_that_looks_like_no_path() -> None:
    from pipeline.adapter.mlflow_model import question as question_in

    for encoded in (b"\xff" * 300, b"\xff" * 6000, bytes(3)):
        row = {"question": "what?", "image": base64.b64encode(encoded).decode()}
        assert question_in(row, opens_files=True).image == encoded
    with pytest.raises(UserError, match="is not base64"):
        question_in({"question": "what?", "image": "no\0picture.png"})
    with pytest.raises(UserError, match="neither a file here nor base64"):
        question_in({"question": "what?", "image": "no\0picture.png"}, opens_files=True)


def test_a_frame_names_files_of_this_machine_only_where_model_config_says_so(tmp_path: Path) -> None:
    from pipeline.adapter.mlflow_model import question as question_in

    picture = tmp_path / "secret.png"
    picture.write_bytes(b"pixels")
    row = {"question": "what?", "image": str(picture)}
    assert question_in(row, opens_files=True).image == b"pixels"
    with pytest.raises(UserError) as there:
        question_in(row)
    with pytest.raises(UserError) as missing:
        question_in({**row, "image": str(picture.with_name("absent.png"))})
    assert str(there.value).replace("secret", "absent") == str(missing.value)  # nor is it told that the file exists
    assert 'model_config={"files": True}' in str(there.value)


@pytest.mark.parametrize(
    ("kind", "side", "sentence"), [("PNG", 5000, "has 5000 x 5000 pixels"), ("TIFF", 8, "expected PNG, JPEG")]
)
def test_a_frame_s_picture_is_looked_at_before_it_is_decoded(kind: str, side: int, sentence: str) -> None:
    from pipeline.adapter.mlflow_model import question as question_in

    buffer = io.BytesIO()
    Image.new("1", (side, side)).save(buffer, kind)
    with pytest.raises(UserError, match=sentence):
        question_in({"question": "what?", "image": buffer.getvalue()})
    assert question_in({"question": "what?", "image": buffer.getvalue()}, opens_files=True).image == buffer.getvalue()
    assert question_in({"question": "what?", "image": tiny.png((9, 9, 9))}).image == tiny.png((9, 9, 9))
