"""An adapter is loaded from the Hub by its name, at a revision, and without a network from the cache."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.adapter.answering import Answerer
from pipeline.adapter.load import load_adapter, source_of
from pipeline.adapter.predict import predict
from pipeline.errors import UserError
from pipeline.hub import adapters
from pipeline.hub import repository as hub
from tests import tiny
from tests.adapters import question, save_adapter, save_models
from tests.hub_stub import COMMIT, FAULTS, REPOSITORY, Stub, hub_of

At = Callable[[Stub], None]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    return save_adapter(folder / "adapter", save_models(folder))


def test_it_answers_as_from_its_folder(adapter: Path, cache: Path, at: At, tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(tiny.png((250, 10, 10)))
    asked = question(0).text
    here = predict(adapter, tmp_path / "picture.png", asked)
    shutil.copytree(adapter, tmp_path / "served")
    (tmp_path / "served" / "photos.zip").write_bytes(b"nothing that an adapter has")
    with hub_of(tmp_path / "served") as stub:
        at(stub)
        answerer = load_adapter(REPOSITORY)
        assert isinstance(answerer, Answerer)
        assert answerer.ask(asked, tmp_path / "picture.png").text == here["answer"]
        assert predict(Path(REPOSITORY), tmp_path / "picture.png", asked) == here, "the verbs take the name too"
        assert not [path for path in stub.asked if "photos.zip" in path]
    (folder,) = cache.glob("models--owner--model/snapshots/*")
    assert folder.name == COMMIT and (folder / "README.md").is_file()


def test_a_revision_is_what_the_hub_is_asked_for(adapter: Path, cache: Path, at: At) -> None:
    with hub_of(adapter) as stub:
        at(stub)
        source_of(Path(f"{REPOSITORY}@v1.0"), answers=False)
        assert f"GET /api/models/{REPOSITORY}/revision/v1.0" in stub.asked
        assert any(f"/{REPOSITORY}/resolve/v1.0/adapter.json" in path for path in stub.asked)
        assert any(f"/resolve/{COMMIT}/prompts.safetensors" in path for path in stub.asked)


@pytest.mark.parametrize("revision", ["", "@v1.0", f"@{COMMIT}"])
def test_without_a_network_the_copy_in_the_cache_is_used(revision: str, adapter: Path, cache: Path, at: At) -> None:
    name = Path(REPOSITORY + revision)
    with hub_of(adapter) as stub:
        at(stub)
        known = source_of(name, answers=False)
    at(stub)  # nobody listens there any more
    assert source_of(name, answers=False).pool.whole_fingerprint() == known.pool.whole_fingerprint()
    with pytest.raises(UserError, match=r"'owner/model@other' is neither a folder here nor an adapter"):
        source_of(Path(f"{REPOSITORY}@other"), answers=False)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_hub_that_does_not_answer_is_said_so_within_seconds(
    fault: str, adapter: Path, cache: Path, at: At, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "PATIENCE_S", 0.3)
    with hub_of(adapter, fault) as stub:
        at(stub)
        with pytest.raises(UserError, match=r"'owner/model' is neither .* `hf download owner/model` fetches one"):
            load_adapter(REPOSITORY)
        assert len(stub.asked) == 1


def test_half_an_adapter_in_the_cache_is_none(adapter: Path, cache: Path, at: At) -> None:
    with hub_of(adapter) as stub:
        at(stub)
        source_of(Path(REPOSITORY), answers=False)
    (kept,) = cache.glob("models--owner--model/snapshots/*/prompts.safetensors")
    kept.unlink()
    at(stub)
    with pytest.raises(UserError, match=r"nor an adapter that could be fetched"):
        load_adapter(REPOSITORY)


def test_another_repository_is_refused_before_its_files_are_fetched(cache: Path, at: At, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with hub_of(tmp_path) as stub:
        at(stub)
        with pytest.raises(UserError, match=r"'owner/model' on the Hugging Face Hub has no adapter\.json; expected an"):
            load_adapter(REPOSITORY)
        assert not [path for path in stub.asked if "resolve" in path]


def test_what_was_changed_on_the_way_is_refused(adapter: Path, cache: Path, at: At, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "served")
    content = bytearray((tmp_path / "served" / "prompts.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "served" / "prompts.safetensors").write_bytes(bytes(content))
    with hub_of(tmp_path / "served") as stub:
        at(stub)
        with pytest.raises(UserError, match=r"not the file that adapter\.json describes"):
            load_adapter(REPOSITORY)


@pytest.mark.parametrize("path", ["nowhere", "runs/typo", "folder/typo", "/owner/model", "a/b/c", "owner/"])
def test_a_local_path_asks_nobody(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "reachable", lambda: pytest.fail("it asks the Hub"))
    assert not adapters.is_on_hub(path)
    with pytest.raises(UserError):
        source_of(Path(path))
