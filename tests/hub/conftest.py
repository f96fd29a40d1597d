"""A machine that may ask a Hub on the loopback."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from pipeline.hub import repository as hub
from pipeline.hub import snapshots
from tests.hub_stub import Stub

RESOLVE = "/{repo_id}/resolve/{revision}/{filename}"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of a machine that may ask the Hub."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(snapshots, "_known", {})
    monkeypatch.setattr(snapshots, "_settings", {})
    for name in ("http_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    hub._connects.cache_clear()
    yield tmp_path / "home" / "hub"
    hub._connects.cache_clear()


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[Stub], None]:
    """Turn to another Hub, as a process that starts anew."""

    def turn(stub: Stub) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", stub.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", stub.address + RESOLVE)
        snapshots._known.clear()
        snapshots._settings.clear()
        hub._connects.cache_clear()

    return turn
