"""The chat: pictures and questions with bounds, answers with the sets that were chosen, and a real model's answers."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.adapter.answering import Question
from pipeline.adapter.load import load_adapter
from pipeline.errors import UserError
from pipeline.ui.answering import Answering
from pipeline.ui.app import Site
from pipeline.ui.server import site_of
from pipeline.ui.web import PageError
from tests import tiny
from tests.adapters import question, save_adapter, save_models
from tests.ui.made import Browser

SETS = {"selected": ["count", "boxes"], "similarity": {"colour": 0.1, "count": 0.5, "boxes": 0.9}}


class Said(Answering):
    """Answers without a model, and keeps what it was asked."""

    def __init__(self, **answer: Any) -> None:
        super().__init__()
        self.answer, self.asked = {"answer": "red", **SETS, **answer}, list[Any]()

    def ask(self, run: Path, text: str, image: bytes | None, task: str | None) -> dict[str, Any]:
        self.asked.append((run.name, text, image, task))
        return self.answer


def browser_of(run: Path, answering: Answering) -> Browser:
    site = site_of([run])
    return Browser(site=Site(site.runs, site.templates, answering=answering))


def sent(browser: Browser, encoded: bytes) -> Any:
    headers = {"x-csrf-token": browser.csrf, "accept": "application/json"}
    return browser.client.post("/sent", content=encoded, headers=headers)


def test_a_question_about_a_sent_picture_is_answered_with_the_sets_that_were_chosen(run: Path) -> None:
    said = Said(answer="[10,20,60,70]", weights={"count": 0.3, "boxes": 0.7}, unfamiliar=True)
    browser, picture = browser_of(run, said), tiny.png((9, 8, 7), 40)
    name = sent(browser, picture).json()["picture"]
    reply = browser.ask("small-s3", question="  where? ", picture=name, task="").json()
    assert said.asked == [("small-s3", "where?", picture, None)]
    assert reply["frames"] == [{"kind": "predicted", "left": 10.0, "top": 20.0, "width": 50.0, "height": 50.0}]
    assert [(one["name"], one["inserted"], one["weight"]) for one in reply["sets"]] == [
        ("boxes", True, 0.7),
        ("count", True, 0.3),
        ("colour", False, None),
    ]
    assert reply["unfamiliar"] is True
    shown = browser.client.get(f"/sent/{name}")
    with Image.open(io.BytesIO(shown.content)) as image:
        assert image.size == (40, 40)
    browser.ask("small-s3", question="how many?", task="count")
    assert said.asked[-1] == ("small-s3", "how many?", None, "count")


def test_a_test_sample_can_be_asked_about(run: Path) -> None:
    said = Said()
    browser = browser_of(run, said)
    text = browser.page("/run/small-s3/chat?stage=after-03&task=count&row=2")
    assert ">Which colour &amp; shape?</textarea>" in text
    name = text.partition('data-picture="')[2].partition('"')[0]
    browser.ask("small-s3", question="x", picture=name)
    assert said.asked[0][2] == tiny.png((120, 90, 200), 32)


@pytest.mark.parametrize(
    ("fields", "status", "expected"),
    [
        ({"question": "  "}, 400, "the question has 0 characters; expected 1 to 4000."),
        ({"question": "x" * 4001}, 400, "the question has 4001 characters"),
        ({"question": 7}, 400, "expected texts as question, picture and task."),
        ({"question": "x", "picture": "gone"}, 404, "This picture is not kept any more; choose it again."),
    ],
)
def test_a_wrong_question_is_refused_with_a_sentence(
    run: Path, fields: dict[str, Any], status: int, expected: str
) -> None:
    reply = browser_of(run, Said()).ask("small-s3", **fields)
    assert reply.status_code == status and reply.json()["error"].startswith(expected)


def test_pictures_that_are_none_too_large_or_bombs_are_refused(run: Path) -> None:
    browser = browser_of(run, Said())
    reply = sent(browser, b"GIF89a and no more")
    assert reply.status_code == 415 and "not readable" in reply.json()["error"]
    assert sent(browser, b"<svg xmlns='http://www.w3.org/2000/svg'><script/></svg>").status_code == 415
    assert sent(browser, bytes((8 << 20) + 1)).status_code == 413
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    assert len(bomb.getvalue()) < 1 << 20
    reply = sent(browser, bomb.getvalue())
    assert reply.status_code == 413 and "expected at most" in reply.json()["error"]


def test_only_the_latest_pictures_are_kept(run: Path) -> None:
    browser = browser_of(run, Said())
    names = [sent(browser, tiny.png((n, n, n))).json()["picture"] for n in range(34)]
    assert [browser.client.get(f"/sent/{name}").status_code for name in names[:3]] == [404, 404, 200]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    return save_adapter(folder / "tiny", save_models(folder))


@pytest.fixture(scope="module")
def answering() -> Iterator[Answering]:
    answering = Answering()
    yield answering
    answering.close()


def test_a_process_answers_as_the_adapter_does_and_a_task_is_chosen_by_hand(
    adapter: Path, answering: Answering
) -> None:
    here, asked = load_adapter(adapter), question(1)
    assert not answering.loaded(adapter)
    found = answering.ask(adapter, asked.text, asked.image, None)
    assert (found["answer"], found["selected"]) == (here.answer([asked])[0].text, ["T1"])
    assert answering.loaded(adapter)
    told = answering.ask(adapter, asked.text, asked.image, "T2")
    assert told["selected"][-1] == "T2" and told["similarity"] == found["similarity"]
    assert told["answer"] == here.answer_told(asked, "T2").text
    with pytest.raises(PageError, match="there is no prompt set of 'T9'; expected one of T0, T1, T2") as refused:
        answering.ask(adapter, asked.text, asked.image, "T9")
    assert refused.value.status == 422
    with pytest.raises(PageError, match="the image is not readable"):
        answering.ask(adapter, asked.text, b"no picture", None)
    assert answering.ask(adapter, asked.text, asked.image, None) == found  # it goes on after a refusal


def test_models_that_cannot_be_loaded_and_a_process_that_dies_are_sentences(
    adapter: Path, answering: Answering, tmp_path: Path
) -> None:
    answering.ask(adapter, "x", None, None)
    assert answering._worker is not None
    answering._worker.process.kill()
    with pytest.raises(PageError, match="The process with the model ended"):
        answering.ask(adapter, "x", None, None)
    assert answering.ask(adapter, "x", None, None)["answer"] is not None
    broken = shutil.copytree(adapter, tmp_path / "broken")
    (broken / "adapter.json").write_text("{")
    with pytest.raises(PageError, match=r"adapter\.json"):
        answering.ask(broken, "x", None, None)
    assert not answering.loaded(adapter)  # one run's models are in memory at a time


def test_a_told_task_ranks_first_as_where_routing_is_measured(adapter: Path, tmp_path: Path) -> None:
    here, asked = load_adapter(adapter), question(0)
    assert here.answer_told(asked, "T0") == here.answer([asked])[0]  # it was routed there
    models = save_models(tmp_path)
    alone = load_adapter(save_adapter(tmp_path / "all", models, selection="all"))
    with pytest.raises(UserError, match="does not choose sets by comparing the tasks"):
        alone.answer_told(Question("x"), "T0")
