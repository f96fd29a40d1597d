"""`export --as vocabulary`: the checkpoint computes what the run does, and its sets' tokens stay out of reach."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.adapter.answering import Question
from pipeline.adapter.load import load_adapter
from pipeline.adapter.vocabulary.export import export_checkpoint
from pipeline.adapter.vocabulary.tokens import MARK, token_text
from pipeline.errors import UserError
from tests import tiny, tiny_clip
from tests.adapter.vocabulary import inputs_of, loaded, photo, read_json, run_logits
from tests.adapters import LENGTH, Models, question, save_adapter
from tests.backbones.tiny_families import FAMILIES

INSERTIONS = ("after_bos", "before_image", "after_image")
# Where an image is announced by the template, by the processor, and not at all; the slow test has the others.
SOME = {"llava": "after_bos", "qwen2_5_vl": "after_image", "idefics3": "before_image"}
EVERY = ("llava", "fast_vlm", "llava_next", "qwen2_5_vl", "internvl", "idefics3", "smolvlm")
ASKED = (Question("how many stripes?", photo(70, 33)), Question("why?"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip.save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, clip: Path) -> Models:
    """A LLaVA whose output layer is tied to its embedding."""
    return Models(tiny.save_llava(tmp_path_factory.mktemp("tied"), tied=True), clip)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, models: Models) -> tuple[Path, Path]:
    """An adapter and the checkpoint that is exported of it."""
    folder = tmp_path_factory.mktemp("exported")
    adapter = save_adapter(folder / "adapter", models)
    export_checkpoint(adapter, folder / "checkpoint")
    return adapter, folder / "checkpoint"


def require_equal_logits(family: str, insertion: str, clip: Path, folder: Path) -> None:
    base = folder / "base"
    base.mkdir()
    adapter = save_adapter(folder / "adapter", Models(FAMILIES[family](base), clip), insertion=insertion)
    export_checkpoint(adapter, folder / "checkpoint")
    model, processor = loaded(folder / "checkpoint")
    run = load_adapter(adapter)
    for asked in ASKED:
        for sets in ([], [1], [2, 0]):
            inputs = inputs_of(processor, asked, [f"T{number}" for number in sets])
            expected = run_logits(run, asked, sets)
            with torch.no_grad():
                logits = model(**inputs).logits[0]
            assert len(logits) == len(expected)
            torch.testing.assert_close(logits[:, : expected.shape[1]], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", SOME)
def test_logits_with_sets_are_those_of_the_run(family: str, clip: Path, tmp_path: Path) -> None:
    require_equal_logits(family, SOME[family], clip, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("insertion", INSERTIONS)
@pytest.mark.parametrize("family", EVERY)
def test_every_architecture_with_every_insertion(family: str, insertion: str, clip: Path, tmp_path: Path) -> None:
    require_equal_logits(family, insertion, clip, tmp_path)


def test_every_architecture_is_exported_or_refused() -> None:
    assert {*EVERY, "gemma3"} == {*FAMILIES}


def test_an_embedding_that_is_scaled_is_refused(clip: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    adapter = save_adapter(tmp_path / "adapter", Models(FAMILIES["gemma3"](base), clip))
    with pytest.raises(UserError, match="gemma3 multiplies the rows of its embedding table"):
        export_checkpoint(adapter, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_transformers_generates_the_answers_of_the_run(exported: tuple[Path, Path]) -> None:
    """The sets of each question are chosen by the adapter that lies in the checkpoint."""
    model, processor = loaded(exported[1])
    run = load_adapter(exported[1] / "adapter")
    for asked in [question(number, variant) for number in range(3) for variant in range(2)]:
        answer = run.answer([asked])[0]
        inputs = inputs_of(processor, asked, answer.selected)
        tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert run.lmm.conversation.decode(tokens[0, inputs["input_ids"].shape[1] :].tolist()) == answer.text


def test_the_list_of_sets_names_the_tokens_that_hold_their_vectors(exported: tuple[Path, Path]) -> None:
    model, processor = loaded(exported[1])
    listed = read_json(exported[1] / "prompt_sets.json")
    table, pool = model.get_input_embeddings().weight, load_adapter(exported[0]).pool
    assert list(listed["sets"]) == pool.names and listed["length"] == LENGTH
    for number, ids in enumerate(listed["sets"].values()):
        assert torch.equal(table[ids], pool.prompts[number])
        assert processor.tokenizer.convert_ids_to_tokens(ids) == [token_text(number, row) for row in range(LENGTH)]


@pytest.mark.parametrize("role", ["user", "system", "assistant"])
def test_no_message_can_hold_a_sets_token(exported: tuple[Path, Path], role: str) -> None:
    _, processor = loaded(exported[1])
    tokenizer = processor.tokenizer
    listed = read_json(exported[1] / "prompt_sets.json")
    every = {token for ids in listed["sets"].values() for token in ids}
    written = f"a{token_text(0, 0)}{MARK}{token_text(1, 1)}{MARK[:1]}b"
    # The tokenizer alone would make them, which is why the template has to prevent it.
    assert every & {*tokenizer(written).input_ids}
    messages = [{"role": "user", "content": [{"type": "text", "text": "hm?"}]}]
    messages.insert(role == "assistant", {"role": role, "content": [{"type": "text", "text": written}]})
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    ids = processor.apply_chat_template(messages, prompt_sets=["T2"], **options)["input_ids"]
    ids = ids[0] if isinstance(ids[0], list) else ids
    assert [token for token in ids if token in every] == listed["sets"]["T2"]


def test_a_set_that_is_not_there_is_named(exported: tuple[Path, Path]) -> None:
    _, processor = loaded(exported[1])
    with pytest.raises(Exception, match="There is no prompt set T9"):
        inputs_of(processor, ASKED[1], ["T9"])


@pytest.mark.parametrize("tied", [True, False])
def test_no_hidden_state_gives_a_sets_token_the_highest_score(tied: bool, clip: Path, tmp_path: Path) -> None:
    """Neither for a sets' vector itself, whose score would be the highest in a tied output layer, nor for others."""
    base = tiny.save_llava(tmp_path / "base", tied=tied)
    export_checkpoint(save_adapter(tmp_path / "adapter", Models(base, clip)), tmp_path / "checkpoint")
    model, processor = loaded(tmp_path / "checkpoint")
    first = read_json(tmp_path / "checkpoint" / "prompt_sets.json")["sets"]["T0"][0]
    assert first == len(tiny.byte_tokenizer()) < len(model.get_output_embeddings().weight)
    vectors = model.get_input_embeddings().weight[first:].detach()
    hidden = torch.cat([torch.randn(2000, tiny.HIDDEN, generator=torch.Generator().manual_seed(0)), 9 * vectors])
    scores = model.get_output_embeddings()(hidden).detach()
    moving = scores.std(1) > 0  # spare rows are zero, and all scores of zero are equal
    assert int(moving.sum()) > 2000 and bool((scores.argmax(1) < first)[moving].all())
    shares = scores.softmax(1)[:, first:]
    assert float(shares.max()) <= 1 / first + 1e-6
    assert model.generation_config.suppress_tokens == [*range(first, len(scores[0]))]
    assert processor.tokenizer.convert_tokens_to_ids(token_text(0, 0)) == first


def test_sets_in_spare_rows_leave_the_table_its_size(clip: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    base = tiny.save_llava(tmp_path / "base")
    grown: Any = AutoModelForImageTextToText.from_pretrained(base)
    grown.resize_token_embeddings(300)
    grown.save_pretrained(base)
    adapter = save_adapter(tmp_path / "adapter", Models(base, clip))
    assert export_checkpoint(adapter, tmp_path / "checkpoint")["vocabulary"] == [300, 300]
    model, processor = loaded(tmp_path / "checkpoint")
    with torch.no_grad():
        logits = model(**inputs_of(processor, ASKED[0], ["T1"])).logits[0]
    expected = run_logits(load_adapter(adapter), ASKED[0], [1])
    others = [row for row in range(300) if not 260 <= row < 260 + 3 * LENGTH]
    torch.testing.assert_close(logits[:, others], expected[:, others], atol=1e-5, rtol=1e-5)
