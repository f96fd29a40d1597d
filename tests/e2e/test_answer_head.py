"""Answer heads in a run: learned, kept, used alike by every way of asking, and refused where they cannot be used."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.adapter.answering import Answerer, Question
from pipeline.adapter.from_run import export
from pipeline.adapter.load import load_adapter, source_of
from pipeline.adapter.vocabulary.export import export_checkpoint
from pipeline.config.recipe import Recipe
from pipeline.errors import UserError
from pipeline.prompts.stage_files import STATE
from pipeline.sequence.run import run_sequence
from tests import tiny, tiny_clip
from tests.adapter.edited import with_tensors
from tests.e2e.conftest import recipe_on
from tests.joining import require_same_answers_in_any_batch
from tests.processes import torchrun

ANSWERS = {"T0": ("red", "green", "blue"), "T1": ("warm", "fresh", "cold tone")}
COLOURS = ((230, 30, 20), (20, 220, 40), (30, 40, 235))
TRAIN, TEST, LIMIT_S = 40, 9, 300
MIX = f"{STATE}answers.mix"


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks about pictures of three colours, whose answers recur."""
    root = tmp_path_factory.mktemp("coloured")
    tiny.save_llava(root / "llava", tied=True)
    tiny_clip.save_clip(root / "clip")
    (root / "coin" / "images").mkdir(parents=True)
    for task, answers in ANSWERS.items():
        folder = root / "coin" / "instructions" / task
        folder.mkdir(parents=True)
        for split, count in (("train", TRAIN), ("test", TEST)):
            entries = [_entry(root / "coin", task, split, n, answers[n % 3]) for n in range(count)]
            (folder / f"{split}.json").write_text(json.dumps(entries), "utf-8")
    from data_prep.prepare import prepare

    prepare(recipe(root, root / "unused"), progress=False)
    return root


def _entry(root: Path, task: str, split: str, number: int, answer: str) -> dict[str, Any]:
    red, green, blue = COLOURS[number % 3]
    shift = (7 * number + (3 if split == "test" else 0)) % 20
    image = f"images/{task}-{split}-{number}.png"
    (root / image).write_bytes(tiny.png((red - shift, green - shift // 2, blue - shift)))
    asked = f"what colour has {task}?"
    if split == "train":
        turns = [{"from": "human", "value": f"<image>\n{asked}"}, {"from": "gpt", "value": answer}]
        return {"id": f"{task}-{number}", "image": image, "conversations": turns}
    return {"question_id": number, "image": image, "text": asked, "answer": answer}


def recipe(root: Path, runs: Path, **changes: Any) -> Recipe:
    fields = {
        "data": {
            "source": "coin",
            "root": str(root / "coin"),
            "prepared": str(root / "data"),
            "tasks": [{"name": task, "max_new_tokens": 12} for task in ANSWERS],
            "validation_share": 0.25,
        },
        "method": {"prompt_length": 4, "router": "random_ridge", "answer_head": "ridge"},
        "evaluate": {"zero_shot": False},
    }
    return recipe_on(root, runs, **{**fields, **changes})


def stages(run: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(run / "stages" / f"0{n + 1}-{task}" / "prompts.safetensors") for n, task in enumerate(ANSWERS)]


def predictions(run: Path, task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "eval" / "after-02" / f"{task}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(coloured: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    made = recipe(coloured, tmp_path_factory.mktemp("run"))
    found = run_sequence(made)
    # Nothing that a random decoder says in two steps is right; the heads name colours that they saw 29 times.
    assert all(score is not None and score > 85 for score in found["accuracy"][-1])
    return made.run_path


def test_without_a_head_the_same_run_says_nothing_right(coloured: Path, tmp_path: Path) -> None:
    method = {"prompt_length": 4, "router": "random_ridge"}
    assert run_sequence(recipe(coloured, tmp_path, method=method))["accuracy"][-1] == [0.0, 0.0]


def test_an_adapter_answers_as_the_run_did_in_any_batch(run: Path, coloured: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "adapter")
    answerer = Answerer(source_of(tmp_path / "adapter"))
    asked, expected = list[Question](), list[str]()
    for task in ANSWERS:
        for number, line in enumerate(predictions(run, task)):
            picture = (coloured / "coin" / "images" / f"{task}-test-{number}.png").read_bytes()
            asked.append(Question(line["question"], picture))
            expected.append(line["prediction"])
    assert [answer.text for answer in answerer.answer(asked, 12)] == expected
    require_same_answers_in_any_batch(answerer, asked, 12)
    # The other task's head gives that task's words for the same colour.
    told = answerer.answer_told(asked[0], "T1")
    assert expected[0] in ANSWERS["T0"] and told.text == ANSWERS["T1"][ANSWERS["T0"].index(expected[0])]
    with pytest.raises(UserError, match=r"decodes without them; expected method\.answer_head none"):
        answerer.prompt_embeds("what?")


def test_a_head_is_part_of_the_fingerprint_by_which_answers_are_reused(run: Path) -> None:
    pool = source_of(run).pool
    print_before = pool.fingerprint(0)
    pool.states[0]["answers.bias"].add_(1.0)
    assert source_of(run).pool.fingerprint(0) == print_before
    changed = pool.picked([0, 1])
    assert changed.fingerprint(0) != print_before and changed.fingerprint(1) == pool.fingerprint(1)


def test_a_head_without_weight_leaves_a_penalised_answer_as_it_is(run: Path, coloured: Path) -> None:
    """Logits are penalised, so weighing must not turn them into other numbers of the same probabilities."""
    asked = [
        Question("what colour has T0?", (coloured / "coin" / "images" / f"T0-test-{number}.png").read_bytes())
        for number in range(3)
    ]
    answers = []
    for mix in ([1.0, 0.0, 1.0, 0.0], None):
        source = source_of(run)
        for state in source.pool.states:
            if mix is None:
                for name in [name for name in state if name.startswith("answers.")]:
                    del state[name]  # type: ignore[attr-defined]
            else:
                state["answers.mix"].copy_(torch.tensor(mix))
        answerer = Answerer(source)
        answerer.lmm.use_repetition_penalty(1.3)
        answers.append([answer.text for answer in answerer.answer(asked, 12)])
    assert answers[0] == answers[1]


def test_an_adapter_of_somebody_else_with_an_unusable_head_is_refused(run: Path, tmp_path: Path) -> None:
    def other_words(tensors: dict[str, torch.Tensor]) -> None:
        tensors["router.0.answers.tokens"][1, 0] = 1e6

    def fewer_answers(tensors: dict[str, torch.Tensor]) -> None:
        tensors["router.0.answers.tokens"] = tensors["router.0.answers.tokens"][:2].clone()

    def narrower_keys(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("centre", "scale", "weights"):
            tensors[f"router.0.answers.{name}"] = tensors[f"router.0.answers.{name}"][2:].clone()

    for change, message in (
        (other_words, r"head of 'T0' has tokens up to 1000000 .*; expected tokens below"),
        (fewer_answers, r"the answer head of 'T0' are not those of one head"),
        (narrower_keys, r"head of 'T0' .* numbers of a sample's keys; expected"),
    ):
        folder = tmp_path / change.__name__
        export(run, folder)
        with_tensors(folder, change)
        with pytest.raises(UserError, match=message):
            load_adapter(folder)


@pytest.mark.gloo
@pytest.mark.parametrize(("ranks", "zero"), [(1, 3), (2, 3)])
def test_every_number_of_ranks_and_zero_stage_learns_the_same_head(
    run: Path, coloured: Path, tmp_path: Path, ranks: int, zero: int
) -> None:
    other = recipe(coloured, tmp_path, train__deepspeed=f"ds_configs/zero{zero}.json")
    other.dump_yaml(tmp_path / "recipe.yaml")
    torchrun(["-m", "pipeline", "train", str(tmp_path / "recipe.yaml")], ranks, LIMIT_S)
    for found, expected in zip(stages(other.run_path), stages(run), strict=True):
        assert found.keys() == expected.keys() and MIX in found
        for name in (name for name in expected if name.startswith(f"{STATE}answers.")):
            torch.testing.assert_close(found[name], expected[name], atol=2e-3, rtol=2e-3, msg=name)


def test_another_router_leaves_the_heads_as_they_are(coloured: Path, tmp_path: Path) -> None:
    first = recipe(coloured, tmp_path)
    run_sequence(first, stages="train")
    before = stages(first.run_path)
    method = {**first.method.model_dump(exclude_defaults=True), "router": "mean"}
    run_sequence(recipe(coloured, tmp_path, method=method))
    for found, expected in zip(stages(first.run_path), before, strict=True):
        assert "prototype" in found
        heads = [name for name in expected if name.startswith(f"{STATE}answers.")]
        assert heads and all(torch.equal(found[name], expected[name]) for name in heads)


def test_a_task_without_held_out_samples_has_no_head(
    coloured: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = {**recipe(coloured, tmp_path).data.model_dump(), "validation_share": 0}
    made = recipe(coloured, tmp_path, data=data)
    with caplog.at_level(logging.WARNING):
        run_sequence(made, stages="train")
    assert "T0 holds no samples of one turn out" in caplog.text
    assert not any("answers." in name for stage in stages(made.run_path) for name in stage)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {"prompt_length": 4, "selection": "all", "answer_head": "ridge"}}, "does not choose modules by"),
        ({"evaluate": {"engine": "vllm", "vllm_url": "http://127.0.0.1:1"}}, "decodes without answer heads"),
    ],
)
def test_what_has_no_use_of_heads_is_refused(
    coloured: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run_sequence(recipe(coloured, tmp_path, **changes))


def test_other_servers_checkpoints_are_refused(run: Path, tmp_path: Path) -> None:
    for form in ("vocabulary", "parts"):
        with pytest.raises(UserError, match=r"weigh every token of an answer, and other servers decode without"):
            export_checkpoint(run, tmp_path / "checkpoint", form)
