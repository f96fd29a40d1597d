"""A checkpoint is one whole folder before anything looks at it, and the Hub is asked for it once."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.backbones.base_model import base_fingerprint
from pipeline.backbones.lmm import load_lmm
from pipeline.backbones.lmm_processor import settings_fingerprint
from pipeline.config.models import ModelConfig
from pipeline.errors import Interrupted, UserError
from pipeline.hub import repository as hub
from pipeline.hub import snapshots
from pipeline.hub.snapshots import Source, checkpoint, settings_folder, share
from pipeline.ranks.world import World
from tests import tiny
from tests.hub_stub import COMMIT, FAULTS, REPOSITORY, Stub, hub_of

ALONE = World(0, 1, 0, torch.device("cpu"))
SOURCE = Source(REPOSITORY)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_llava(tmp_path_factory.mktemp("repository"))


def test_a_repository_is_whole_and_has_the_fingerprints_of_its_folder(
    llava: Path, cache: Path, at: Callable[[Stub], None]
) -> None:
    by_id, by_folder = ModelConfig(path=REPOSITORY), ModelConfig(path=str(llava))
    with hub_of(llava) as stub:
        at(stub)
        first = base_fingerprint(by_id)
        assert (checkpoint(SOURCE).folder / "model.safetensors").is_file()
        at(stub)
        assert first == base_fingerprint(by_id) == base_fingerprint(by_folder), "before and after the first download"
        assert settings_fingerprint(by_id) == settings_fingerprint(by_folder)


def test_the_hub_is_asked_once_for_all_that_is_loaded(llava: Path, cache: Path, at: Callable[[Stub], None]) -> None:
    with hub_of(llava) as stub:
        at(stub)
        share(ALONE, [SOURCE])
        asked = len(stub.asked)
        for _ in range(2):
            load_lmm(ModelConfig(path=REPOSITORY))
        settings_fingerprint(ModelConfig(path=REPOSITORY))
        assert len(stub.asked) == asked
        at(stub)
        checkpoint(SOURCE)
        assert stub.asked[asked:] == [f"GET /api/models/{REPOSITORY}"], "what is here already is one question"


def test_a_cached_model_is_used_without_a_network(llava: Path, cache: Path, at: Callable[[Stub], None]) -> None:
    with hub_of(llava) as stub:
        at(stub)
        checkpoint(SOURCE)
    at(stub)  # nobody listens there any more
    assert checkpoint(SOURCE).commit == COMMIT
    assert load_lmm(ModelConfig(path=REPOSITORY)).family.kind == "llava"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_hub_that_does_not_answer_is_said_so_and_what_is_here_is_used(
    fault: str, llava: Path, cache: Path, at: Callable[[Stub], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "PATIENCE_S", 0.3)
    with hub_of(llava, fault) as stub:
        at(stub)
        with pytest.raises(UserError, match=r"model\.path is 'owner/model'.*fetched from the Hugging Face Hub"):
            checkpoint(SOURCE)
        stub.fault = ""
        at(stub)
        checkpoint(SOURCE)
        stub.fault = fault
        at(stub)
        assert checkpoint(SOURCE).commit == COMMIT


def test_a_check_fetches_no_weights(llava: Path, cache: Path, at: Callable[[Stub], None]) -> None:
    with hub_of(llava) as stub:
        at(stub)
        folder = settings_folder(SOURCE)
        assert (folder / "config.json").is_file() and (folder / "tokenizer.json").is_file()
        assert not any("safetensors" in asked for asked in stub.asked)
        asked = len(stub.asked)
        settings_folder(SOURCE)
        assert len(stub.asked) == asked, "the Hub is asked once, however many parts of a check look there"


def test_weights_that_the_repository_does_not_have_are_an_error(
    llava: Path, cache: Path, at: Callable[[Stub], None], tmp_path: Path
) -> None:
    folder = shutil.copytree(llava, tmp_path / "half")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = '{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
    (folder / "model.safetensors.index.json").write_text(index)
    with hub_of(folder) as stub:
        at(stub)
        with pytest.raises(UserError, match=r"model\.path: .* lacks weights \(model-00002-of-00002\.safetensors\)"):
            base_fingerprint(ModelConfig(path=REPOSITORY))


def test_weights_of_another_kind_of_model_are_not_fetched(llava: Path, cache: Path, at: Callable[[Stub], None]) -> None:
    with hub_of(llava) as stub:
        at(stub)
        with pytest.raises(UserError, match=r"keys\.path: .* is a model of type 'llava'; supported are clip"):
            checkpoint(Source(REPOSITORY, None, "keys.path", "a CLIP's", ("clip",)))
        assert not any("safetensors" in asked for asked in stub.asked)


def test_a_repository_with_bin_files_alone_is_converted(
    llava: Path, cache: Path, at: Callable[[Stub], None], tmp_path: Path
) -> None:
    folder = shutil.copytree(llava, tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with hub_of(folder) as stub:
        at(stub)
        assert base_fingerprint(ModelConfig(path=REPOSITORY)) == base_fingerprint(ModelConfig(path=str(llava)))
        assert checkpoint(SOURCE).commit == COMMIT


def test_a_stop_ends_the_waiting_for_a_download(
    llava: Path, cache: Path, at: Callable[[Stub], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "ROUND_S", 0.05)

    def stop() -> Any:
        raise Interrupted("told to")

    with hub_of(llava, "hangs", faulty="model.safetensors") as stub:
        at(stub)
        with pytest.raises(Interrupted):
            share(ALONE, [SOURCE], stop)
        stub.fault = ""
        stub.ended.set()
        for thread in threading.enumerate():  # the client is one for all tests
            if thread.name == snapshots.FETCHING:
                thread.join()


def test_a_node_that_does_not_see_rank_0s_cache_fetches_the_same_commit(
    llava: Path, cache: Path, at: Callable[[Stub], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    elsewhere = snapshots.Snapshot(tmp_path / "on another node", COMMIT)
    monkeypatch.setattr(snapshots, "broadcast_object", lambda _: elsewhere)
    with hub_of(llava) as stub:
        at(stub)
        share(World(1, 2, 0, torch.device("cpu")), [SOURCE])
        assert checkpoint(SOURCE).folder.is_relative_to(cache)
        assert f"GET /api/models/{REPOSITORY}/revision/{COMMIT}" in stub.asked


def test_the_other_ranks_of_such_a_node_take_what_one_of_them_fetched(
    llava: Path, cache: Path, at: Callable[[Stub], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    elsewhere = snapshots.Snapshot(tmp_path / "on another node", COMMIT)
    monkeypatch.setattr(snapshots, "broadcast_object", lambda _: elsewhere)
    with hub_of(llava) as stub:
        at(stub)
        share(World(8, 16, 0, torch.device("cpu")), [SOURCE])
        at(stub)  # another process
        stub.asked.clear()
        share(World(9, 16, 1, torch.device("cpu")), [SOURCE])
        assert (checkpoint(SOURCE).commit, stub.asked) == (COMMIT, [])
