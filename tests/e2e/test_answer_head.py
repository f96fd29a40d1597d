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
from pipeline.config.load import load_run
from pipeline.config.recipe import Recipe
from pipeline.errors import UserError
from pipeline.prompts.stage_files import STATE
from pipeline.runs.layout import METRICS, REPLACING_HEADS
from pipeline.sequence.again import begin_again
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
PLAIN = {"prompt_length": 4, "router": "random_ridge"}  # without heads


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


@pytest.mark.gloo
def test_two_ranks_give_a_finished_run_the_heads_that_it_would_have_had(
    run: Path, coloured: Path, tmp_path: Path
) -> None:
    run_sequence(recipe(coloured, tmp_path, method=PLAIN), stages="train")
    asked = recipe(coloured, tmp_path, train__deepspeed="ds_configs/zero3.json")
    asked.dump_yaml(tmp_path / "recipe.yaml")
    torchrun(["-m", "pipeline", "run", str(tmp_path / "recipe.yaml")], 2, LIMIT_S)
    for found, expected in zip(stages(asked.run_path), stages(run), strict=True):
        assert found.keys() == expected.keys() and MIX in found
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=2e-3, rtol=2e-3, msg=name)


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


def test_a_finished_run_gets_heads_without_training(run: Path, coloured: Path, tmp_path: Path) -> None:
    plain = recipe(coloured, tmp_path, method=PLAIN)
    run_sequence(plain)
    before = stages(plain.run_path)
    found = run_sequence(recipe(coloured, tmp_path))
    after = stages(plain.run_path)
    for one, other, whole in zip(before, after, stages(run), strict=True):
        assert other.keys() == whole.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
        for name in other.keys() - one.keys():
            torch.testing.assert_close(other[name], whole[name])  # as if it had been there from the first task on
    assert all(score is not None and score > 85 for score in found["accuracy"][-1])
    assert load_run(plain.run_path).method.keeps_answer_heads
    assert (plain.run_path / "stages" / "01-T0" / METRICS).is_file()
    # And back: the answers are those of before.
    assert run_sequence(plain)["accuracy"][-1] == [0.0, 0.0]
    assert [found.keys() for found in stages(plain.run_path)] == [found.keys() for found in before]


def test_a_run_killed_while_it_got_heads_is_completed_by_the_next_call(coloured: Path, tmp_path: Path) -> None:
    plain = recipe(coloured, tmp_path, method=PLAIN)
    run_sequence(plain, stages="train")
    # Killed between the two renames of the first stage's folder.
    (plain.run_path / REPLACING_HEADS).touch()
    folder = plain.run_path / "stages" / "01-T0"
    folder.rename(folder.with_name("01-T0.unfinished"))
    with pytest.raises(UserError, match=r"answer heads of .* are being replaced, or a process was killed"):
        source_of(plain.run_path)
    run_sequence(recipe(coloured, tmp_path), stages="train")
    assert all(MIX in found for found in stages(plain.run_path)) and not (plain.run_path / REPLACING_HEADS).exists()


def test_a_stage_in_training_goes_on_when_earlier_ones_get_heads(
    coloured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = recipe(coloured, tmp_path, method=PLAIN, train__steps=4, train__save_steps=2)
    run_sequence(plain, stages="train", until=1)

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("pipeline.sequence.stage.StageTrainer._left", stopped)
        with pytest.raises(KeyboardInterrupt):
            run_sequence(plain, stages="train")
    with caplog.at_level(logging.INFO):
        run_sequence(recipe(coloured, tmp_path, train__steps=4, train__save_steps=2), stages="train")
    assert "whose answer head was made: 1." in caplog.text
    assert "resuming after step 2" in caplog.text
    assert all(MIX in found for found in stages(plain.run_path))


@pytest.mark.parametrize("method", ["core_moe", "dualprompt"])
def test_stages_that_hold_other_values_than_were_trained_get_no_heads(
    method: str, coloured: Path, tmp_path: Path
) -> None:
    plain = recipe(coloured, tmp_path, method={"name": method})
    run_sequence(plain, stages="train", until=1)
    with pytest.raises(UserError, match=r"the file of stage T0 has other values than those that"):
        run_sequence(recipe(coloured, tmp_path, method={"name": method, "answer_head": "ridge"}), stages="train")
    assert not load_run(plain.run_path).method.keeps_answer_heads
    assert run_sequence(plain, stages="train", until=1)["stages"] == 1


def test_heads_are_not_made_beside_a_further_attempt(coloured: Path, tmp_path: Path) -> None:
    plain = recipe(coloured, tmp_path, method=PLAIN)
    run_sequence(plain, stages="train")
    begin_again(plain.run_path, "T1", [], {})
    with pytest.raises(UserError, match=r"a further attempt at T1 is not finished"):
        run_sequence(recipe(coloured, tmp_path), stages="train")
