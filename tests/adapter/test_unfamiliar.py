"""Questions that resemble no task: marked, or answered by the frozen model alone, wherever questions are answered."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from pipeline.adapter.answering import Answer, Answerer, Question
from pipeline.adapter.load import load_adapter, source_of
from pipeline.cli.commands import app
from pipeline.config.method import method_options
from pipeline.config.unfamiliar import Unfamiliar
from pipeline.errors import EXIT_OK, EXIT_USER, UserError
from pipeline.prompts.pool import PromptPool
from tests import tiny
from tests.adapters import foreign, question, save_adapter, save_models

ROUTERS: dict[str, dict[str, Any]] = {
    "prototype": {"unfamiliar": "flag"},
    "random_ridge": {"router": "random_ridge", "gate": None, "share": 0.5},
}
MIDDLE = 6  # a variant of a question that is neither the shortest nor the longest of its task's
Save = Callable[..., Path]


@pytest.fixture(scope="module")
def save(tmp_path_factory: pytest.TempPathFactory) -> Save:
    """Writes an adapter of three tasks with these options of the method."""
    models = save_models(tmp_path_factory.mktemp("models"))
    return lambda **method: save_adapter(tmp_path_factory.mktemp("adapter") / "tiny", models, **method)


@pytest.fixture(scope="module", params=sorted(ROUTERS))
def adapter(request: pytest.FixtureRequest, save: Save) -> Path:
    """An adapter that keeps keys of its tasks."""
    return save(**ROUTERS[request.param])


@pytest.fixture(scope="module")
def plain(save: Save) -> Path:
    """An adapter as earlier versions wrote them."""
    return save()


def frozen(adapter: Path, asked: list[Question]) -> list[str]:
    """What the frozen model answers, without any set."""
    source = replace(source_of(adapter), pool=PromptPool(), method=method_options(name="zero_shot"))
    return [answer.text for answer in Answerer(source).answer(asked)]


def test_a_foreign_question_is_marked_and_own_ones_are_not(adapter: Path) -> None:
    answerer = load_adapter(adapter, unfamiliar="flag")
    own = answerer.answer([question(number, variant) for number in range(3) for variant in (5, 6, 7, 9)])
    assert [answer.unfamiliar for answer in own] == [False] * 12
    strange = answerer.answer([foreign(), foreign(with_image=False)])
    assert [answer.unfamiliar for answer in strange] == [True, True]
    assert all(answer.selected for answer in (*own, *strange))
    for number, answer in enumerate(own):
        assert answer.probability is not None and sum(answer.probability.values()) == pytest.approx(1.0, abs=1e-3)
        assert max(answer.probability, key=answer.probability.__getitem__) == f"T{number // 4}"


def test_zero_shot_is_what_the_frozen_model_answers_alone(adapter: Path) -> None:
    strange = [Question(foreign().text, tiny.png((shade, 0, shade // 2))) for shade in range(0, 80, 10)]
    asked = [*strange, question(0, MIDDLE), foreign(with_image=False)]
    found = load_adapter(adapter, unfamiliar="zero_shot").answer(asked)
    alone, as_always = frozen(adapter, asked), load_adapter(adapter, unfamiliar="answer").answer(asked)
    assert [answer.text for answer in found] == [*alone[:-2], as_always[-2].text, alone[-1]]
    assert [answer.selected for answer in found] == [*([] for _ in strange), ["T0"], []]
    assert [answer.text for answer in as_always[:-2]] != alone[:-2]  # the sets do change answers


def test_one_batch_takes_questions_of_different_modes(adapter: Path) -> None:
    answerer = load_adapter(adapter)
    modes: tuple[Unfamiliar | None, ...] = ("zero_shot", "answer", "flag", None)
    found = answerer.answer([replace(foreign(), unfamiliar=mode) for mode in modes])
    assert [bool(answer.selected) for answer in found] == [False, True, True, True]
    assert [answer.unfamiliar for answer in found] == [True] * 4
    assert found[0].text == frozen(adapter, [foreign()])[0]


def test_sets_without_kept_keys_know_nothing_of_it_and_say_what_to_do(plain: Path) -> None:
    answer = load_adapter(plain).answer([foreign()])[0]
    assert (answer.probability, answer.unfamiliar) == (None, None)
    for mode in ("flag", "zero_shot"):
        with pytest.raises(UserError, match=r"keep no routing keys .* method.unfamiliar=flag"):
            load_adapter(plain, unfamiliar=mode)
        with pytest.raises(UserError, match="keep no routing keys"):
            load_adapter(plain).answer([replace(foreign(), unfamiliar=mode)])
    assert load_adapter(plain, unfamiliar="answer").ask("what?") == load_adapter(plain).ask("what?")


def test_a_method_that_does_not_recognise_tasks_has_no_use_for_it(save: Save) -> None:
    told = save(selection="oracle")
    with pytest.raises(UserError, match="does not choose sets by comparing a question with the tasks"):
        load_adapter(told, unfamiliar="flag")


# ------------------------------------------------------------------ on the command line


def run(*arguments: str | Path, typed: str | None = None) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, list(map(str, arguments)), input=typed)
    return done.exit_code, done.stdout, done.stderr


def test_predict_says_it_as_text_and_as_json(adapter: Path) -> None:
    asked = foreign(with_image=False).text
    code, said, _ = run("predict", adapter, "--question", asked, "--unfamiliar", "zero_shot")
    assert code == EXIT_OK and "sets: none" in said and "unfamiliar: True" in said
    assert "note: the question resembles no task: it is farther" in " ".join(said.split())
    code, said, _ = run("predict", adapter, "--question", asked, "--unfamiliar", "flag", "--json")
    found = json.loads(said.splitlines()[-1])
    assert code == EXIT_OK and found["unfamiliar"] is True and found["selected"]
    assert found["probability"].keys() == {"T0", "T1", "T2"}
    assert f"{found['selected'][-1]} {100 * max(found['probability'].values()):.0f} %" in found["sets"]
    assert run("predict", adapter, "--question", asked, "--unfamiliar", "refuse")[0] == EXIT_USER


def test_predict_with_earlier_sets_shows_what_it_showed(plain: Path) -> None:
    code, said, _ = run("predict", plain, "--question", question(1, MIDDLE).text, "--json")
    assert code == EXIT_OK
    assert json.loads(said.splitlines()[-1]).keys() == {"answer", "sets", "selected", "similarity"}
    code, _, error = run("predict", plain, "--question", "what?", "--unfamiliar", "flag")
    assert code == EXIT_USER and "keep no routing keys" in error


def test_chat_remarks_on_it(adapter: Path) -> None:
    typed = f"{question(1, MIDDLE).text}\n{foreign(with_image=False).text}\n/quit\n"
    code, said, error = run("chat", adapter, "--unfamiliar", "zero_shot", typed=typed)
    assert code == EXIT_OK, error
    own, strange = (line for line in said.splitlines() if "prompt sets:" in line)
    assert own.endswith(" %)") and "T1 " in own and "resembles no task" not in own
    assert strange.endswith("(prompt sets: none; the question resembles no task)")


# ------------------------------------------------------------------ as a registered model


def test_a_frame_has_columns_for_it(adapter: Path, plain: Path) -> None:
    import pandas

    from pipeline.adapter.mlflow_model import AdapterModel

    asked = pandas.DataFrame(
        {"question": [question(0, MIDDLE).text, foreign().text], "image": [question(0, MIDDLE).image, None]}
    )
    model = AdapterModel()
    context = SimpleNamespace(artifacts={"adapter": str(adapter)}, model_config={"unfamiliar": "zero_shot"})
    model.load_context(context)
    found = model.predict(context, asked)
    assert list(found["unfamiliar"]) == [False, True] and list(found["selected"]) == ["T0", ""]
    assert json.loads(found["probability"][0])["T0"] > 0.5
    model.load_context(SimpleNamespace(artifacts={"adapter": str(plain)}, model_config=None))
    assert list(model.predict(None, asked)["unfamiliar"]) == [None, None]
    with pytest.raises(UserError, match="unfamiliar in model_config is 'no'"):
        model.load_context(SimpleNamespace(artifacts={"adapter": str(adapter)}, model_config={"unfamiliar": "no"}))


def test_the_sets_are_named_with_the_probability_or_else_the_similarity() -> None:
    routed = Answer(selected=["A", "B"], similarity={"A": 0.123, "B": 4.2}, text="red")
    assert routed.sets == "B 4.20, A 0.12"
    assert replace(routed, probability={"A": 0.014, "B": 0.986}).sets == "B 99 %, A 1 %"
    assert Answer(selected=["A"], text="red").sets == "A" and Answer().sets == "none"
