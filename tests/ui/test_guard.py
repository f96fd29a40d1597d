"""Who is let in: the browser with the token, under the server's own name, with forms of its own pages."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.testclient import TestClient

from pipeline.ui.server import app_of, site_of
from tests import tiny
from tests.ui.made import PORT, TOKEN, Browser

PLACES = {
    "name": "small-s3",
    "file": "ui.css",
    "group:int": "0",
    "figure": "course",
    "picture": "x",
    "number:int": "1",
}


@pytest.fixture
def application(run: Path) -> Starlette:
    return app_of(site_of([run]), TOKEN, PORT)


@pytest.fixture
def stranger(application: Starlette) -> TestClient:
    """A client that never saw the printed address."""
    return TestClient(application, base_url="http://127.0.0.1", follow_redirects=False)


def addresses(application: Starlette, method: str) -> list[str]:
    """The addresses of all routes with a method, filled in for the made run."""
    found = [route.path for route in application.routes if isinstance(route, Route) and method in (route.methods or ())]
    for place, value in PLACES.items():
        found = [address.replace("{" + place + "}", value) for address in found]
    assert found and not [address for address in found if "{" in address]
    return found


def test_without_the_token_nothing_is_shown_and_nothing_is_done(application: Starlette, stranger: TestClient) -> None:
    for address in addresses(application, "GET"):
        assert stranger.get(address).status_code == 403, address
    for address in addresses(application, "POST"):
        assert stranger.post(address).status_code == 403, address
    assert stranger.get("/?token=another").status_code == 403
    assert stranger.get("/", headers={"cookie": f"pipeline_ui_{PORT}=another"}).status_code == 403


def test_the_printed_address_lets_in_and_leaves_no_token_in_the_addresses(stranger: TestClient) -> None:
    reply = stranger.get(f"/run/small-s3/examples?task=boxes&token={TOKEN}")
    assert (reply.status_code, reply.headers["location"]) == (303, "/run/small-s3/examples?task=boxes")
    assert "httponly" in reply.headers["set-cookie"].lower() and "samesite=lax" in reply.headers["set-cookie"].lower()
    assert stranger.get("/run/small-s3/examples?task=boxes").status_code == 200


def test_the_redirect_leads_to_no_other_server(stranger: TestClient) -> None:
    reply = stranger.request("GET", f"http://127.0.0.1//other.example/?token={TOKEN}")
    assert reply.headers["location"] == "/other.example/"


def test_every_request_that_changes_something_needs_the_token_of_a_form(
    application: Starlette, browser: Browser
) -> None:
    found = addresses(application, "POST")
    assert len(found) == 5
    for address in found:
        for guess in ({}, {"csrf": "guessed"}):
            assert browser.client.post(address, data=guess).status_code == 403, address
        assert browser.client.post(address, headers={"x-csrf-token": "guessed"}).status_code == 403, address
        other = {"origin": "http://other.example", "x-csrf-token": browser.csrf}
        assert browser.client.post(address, headers=other).status_code == 403, address
    own = {"origin": "http://127.0.0.1", "x-csrf-token": browser.csrf}
    assert browser.client.post("/sent", headers=own, content=tiny.png((1, 2, 3))).status_code == 200


def test_another_host_name_is_refused(application: Starlette) -> None:
    client = TestClient(application, base_url="http://rebound.example")
    assert client.get(f"/?token={TOKEN}").status_code == 400


def test_pages_run_no_script_but_their_own_and_are_in_no_frame(browser: Browser) -> None:
    for address in ("/", "/run/small-s3/", "/run/small-s3/examples", "/nowhere", "/static/ui.js"):
        headers = browser.client.get(address).headers
        policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'" and policy["script-src"] == policy["style-src"] == "'self'"
        assert policy["frame-ancestors"] == policy["base-uri"] == "'none'" and policy["form-action"] == "'self'"
        assert headers["x-content-type-options"] == "nosniff"
    for address in ("", "examples", "chat", "add"):
        text = browser.page(f"/run/small-s3/{address}")
        assert " style=" not in text and "<style" not in text and text.count("<script") == 1 and " onclick" not in text


@pytest.mark.parametrize("file", ["ui.py", "..%2Fweb.py", "%2e%2e/web.py"])
def test_only_the_two_static_files_are_served(browser: Browser, file: str) -> None:
    assert browser.client.get(f"/static/{file}").status_code == 404


def test_a_form_has_bounds(browser: Browser) -> None:
    long = browser.send("/run/small-s3/add", task="x" * 70_000)
    assert long.status_code == 413 and "larger than 64 KiB" in long.text
    odd = browser.client.post("/run/small-s3/add", content=b"\xff\xfe")
    assert odd.status_code == 400
