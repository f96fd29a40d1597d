"""The labelling page's server: what it writes, and whom it keeps out. The page itself is in tests/browser."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from PIL import Image
from starlette.testclient import TestClient

from pipeline.clip.active.ask_files import Question, read_answers, remove_question, write_question
from pipeline.clip.labelling import server
from pipeline.clip.labelling.answers import Answers
from pipeline.clip.labelling.app import LabellingPage
from pipeline.errors import UserError
from tests.clip.people import CLASSES, asked, write
from tests.clip.project import said

TOKEN = "token"
QUESTION = Question("coop-photos-s1", 2, 3, "photos", CLASSES, ("a.jpg", "b.jpg", "c.jpg"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_question(tmp_path, QUESTION, [Image.new("RGB", (30, 20)) for _ in QUESTION.images])
    return tmp_path


@pytest.fixture
def ended() -> list[bool]:
    return []


@pytest.fixture
def client(run: Path, ended: list[bool]) -> TestClient:
    page = LabellingPage(Answers(run), TOKEN, lambda: ended.append(True))
    return TestClient(page.app(), base_url="http://127.0.0.1:8000")


def answer(number: int, label: str | None, question: str = QUESTION.identity) -> dict[str, object]:
    return {"question": question, "number": number, "label": label}


def test_every_answer_is_in_the_file_as_soon_as_it_is_given(run: Path, client: TestClient) -> None:
    for number, label in ((2, "green square"), (1, "-"), (2, None), (3, "red square")):
        assert client.post(f"/{TOKEN}/answer", json=answer(number, label)).status_code == 200
        assert read_answers(run, QUESTION)[number - 1] == label
    assert [row["label"] for row in asked(run)] == ["-", "", "red square"]
    state = client.get(f"/{TOKEN}/state").json()
    assert state["answers"] == ["-", None, "red square"] and state["classes"] == list(CLASSES) and state["round"] == 2


def test_an_edit_of_the_file_beside_the_page_is_kept(run: Path, client: TestClient) -> None:
    write(run, [{**row, "label": "blue square" * (row["image"] == "c.jpg")} for row in asked(run)])
    client.post(f"/{TOKEN}/answer", json=answer(1, "red square"))
    assert read_answers(run, QUESTION) == ["red square", None, "blue square"]


def test_it_ends_when_all_is_labelled_and_not_before(client: TestClient, ended: list[bool]) -> None:
    assert client.post(f"/{TOKEN}/done", json={}).status_code == 409 and not ended
    for number in (1, 2, 3):
        client.post(f"/{TOKEN}/answer", json=answer(number, "red square"))
    assert client.post(f"/{TOKEN}/done", json={}).status_code == 200 and ended


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (answer(4, "red square"), 422),
        (answer(0, "red square"), 422),
        (answer(1, "cat"), 422),
        (answer(1, "red square", "another"), 409),
        ({"number": 1, "label": "red square"}, 400),
        ({**answer(1, "red square"), "label": 3}, 400),
        ({**answer(1, "red square"), "more": "x" * 5000}, 400),
    ],
)
def test_an_answer_that_makes_no_sense_changes_nothing(
    run: Path, client: TestClient, content: dict[str, object], status: int
) -> None:
    before = (run / "ask.csv").read_bytes()
    reply = client.post(f"/{TOKEN}/answer", json=content)
    assert reply.status_code == status and reply.json()["error"]
    assert (run / "ask.csv").read_bytes() == before


def test_answers_to_a_round_that_is_over_are_refused(run: Path, client: TestClient) -> None:
    remove_question(run)
    assert client.post(f"/{TOKEN}/answer", json=answer(1, "red square")).status_code == 409
    assert client.get(f"/{TOKEN}/state").json() is None
    assert not (run / "ask.csv").exists()


def test_pictures_are_those_of_the_question(client: TestClient) -> None:
    reply = client.get(f"/{TOKEN}/picture/{QUESTION.identity}/2")
    assert reply.status_code == 200 and reply.headers["content-type"] == "image/jpeg"
    for path in (f"{QUESTION.identity}/4", "another/1", "..%2Fask/1", f"{QUESTION.identity}/..%2F..%2Fask.csv"):
        assert client.get(f"/{TOKEN}/picture/{path}").status_code == 404


def test_other_pages_hosts_and_addresses_are_kept_out(run: Path, client: TestClient) -> None:
    content = answer(1, "red square")
    assert client.get("/other/").status_code == client.get("/other/state").status_code == 404
    assert client.post("/other/answer", json=content).status_code == 404
    assert client.get(f"/{TOKEN}/state", headers={"host": "evil.example:8000"}).status_code == 400
    origin = {"origin": "http://evil.example"}
    assert client.post(f"/{TOKEN}/answer", json=content, headers=origin).status_code == 403
    plain = {"content-type": "text/plain"}  # what a form of another page can send without asking
    assert client.post(f"/{TOKEN}/answer", content=b"{}", headers=plain).status_code == 415
    assert read_answers(run, QUESTION) == [None] * 3
    own = {"origin": "http://127.0.0.1:8000"}
    assert client.post(f"/{TOKEN}/answer", json=content, headers=own).status_code == 200
    policy = client.get(f"/{TOKEN}/").headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy


def test_a_file_that_a_person_broke_is_said_and_left(run: Path, client: TestClient) -> None:
    (run / "ask.csv").write_text("image,label\na.jpg,cat\n")
    for reply in (client.get(f"/{TOKEN}/state"), client.post(f"/{TOKEN}/answer", json=answer(1, "red square"))):
        assert reply.status_code == 422 and "has the class 'cat'" in reply.json()["error"]
    assert (run / "ask.csv").read_text() == "image,label\na.jpg,cat\n"


def test_a_run_that_asks_nothing_and_a_folder_that_is_no_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run"):
        server.label(tmp_path, server.Desk())
    (tmp_path / "config.yaml").write_text("kind: clip\n")
    with pytest.raises(UserError, match="asks for no labels now"):
        server.label(tmp_path, server.Desk())


@pytest.mark.parametrize("recipe", ["nano", "active_nano"])
def test_a_recipe_that_asks_nobody_needs_no_page(recipe: str) -> None:
    assert "set active.oracle to file" in said("run", recipe, "--label")


def test_a_port_in_use_is_said(run: Path) -> None:
    (run / "config.yaml").write_text("kind: clip\n")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(UserError, match="choose another --port"):
            server.label(run, server.Desk(other.getsockname()[1]))
