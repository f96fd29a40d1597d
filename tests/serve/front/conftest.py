"""A front in this process with a fake engine behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from pipeline.adapter.choosing import Chooser
from pipeline.adapter.vocabulary.export import export_checkpoint
from pipeline.serve.front.engine import Behind, Engine
from pipeline.serve.front.front import Front
from pipeline.serve.front.sets import Folder, Sets
from pipeline.serve.web import Settings
from tests.serve.front.fake_engine import FakeEngine


@pytest.fixture(scope="session")
def checkpoint(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "checkpoint"
    export_checkpoint(adapter, folder)
    return folder


@pytest.fixture
def engine(checkpoint: Path) -> Iterator[FakeEngine]:
    fake = FakeEngine(checkpoint).up()
    yield fake
    fake.down()


@pytest.fixture(scope="session")
def sets(adapter: Path) -> Sets:
    return Folder(adapter, "vocabulary").read()


@pytest.fixture(scope="session")
def chooser(sets: Sets) -> Chooser:
    return Chooser(sets.source, "cpu")


@dataclass
class Asked:
    """A client of a front in this process."""

    front: Front
    client: TestClient

    def post(self, **fields: Any) -> Any:
        return self.client.post("/v1/chat/completions", json={"model": "m", **fields})


Fronts = Callable[..., Asked]


@pytest.fixture
def fronts(chooser: Chooser, sets: Sets, engine: FakeEngine) -> Iterator[Fronts]:
    """Makes a front with these settings before the fake engine."""
    made = list[TestClient]()

    def make(most: int = 16, key: str | None = None, **settings: Any) -> Asked:
        behind = Behind(engine.url, sets.form, key)
        front = Front(sets, chooser, Engine(behind), Settings("m", **settings), most, lambda: sets)
        client = TestClient(front.app(), base_url="http://localhost")
        client.__enter__()
        made.append(client)
        return Asked(front, client)

    yield make
    for client in made:
        client.__exit__(None, None, None)


@pytest.fixture
def asked(fronts: Fronts) -> Asked:
    return fronts()
