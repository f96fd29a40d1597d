"""Weights that exist only as .bin files: converted once, to the bit, and without running what a pickle says."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

from pipeline.backbones.lmm import load_lmm
from pipeline.config.models import ModelConfig
from pipeline.errors import UserError
from pipeline.hub import pickled
from pipeline.hub.pickled import is_converted, with_safetensors
from pipeline.hub.weights import PICKLED_INDEX, tensors_fingerprint
from tests import tiny


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_llava(tmp_path_factory.mktemp("pickled") / "llava")


@pytest.fixture
def folder(llava: Path, tmp_path: Path) -> Path:
    """The same checkpoint with its weights in two .bin files."""
    folder = shutil.copytree(llava, tmp_path / "llava")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index: dict[str, str] = {}
    for number, part in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / PICKLED_INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": index}))
    return folder


def test_a_converted_model_is_the_same_model(folder: Path, llava: Path) -> None:
    assert not is_converted(folder)
    found = with_safetensors(folder)
    assert is_converted(folder)
    assert tensors_fingerprint(found) == tensors_fingerprint(llava)
    expected = load_lmm(ModelConfig(path=str(llava))).state_dict()
    for name, value in load_lmm(ModelConfig(path=str(folder))).state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_it_is_converted_once_by_whoever_comes_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converted: list[str] = []
    convert = pickled._convert_file

    def counting(source: Path, target: Path) -> None:
        converted.append(source.name)
        convert(source, target)

    monkeypatch.setattr(pickled, "_convert_file", counting)
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: with_safetensors(folder), range(4)))
    assert len(found) == 1
    assert len(converted) == 2


def test_a_conversion_that_fails_leaves_nothing(folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pickled, "_compare", full)
    with pytest.raises(UserError, match=r"cannot be converted into .*No space left.*HF_HOME"):
        with_safetensors(folder)
    assert [path.suffix for path in (home / pickled.CONVERTED).iterdir()] == [".lock"]


def test_other_weights_in_the_same_place_are_converted_anew(folder: Path) -> None:
    before = tensors_fingerprint(with_safetensors(folder))
    first = folder / "pytorch_model-00001-of-00002.bin"
    torch.save({name: value + 1 for name, value in torch.load(first).items()}, first)
    assert tensors_fingerprint(with_safetensors(folder)) != before


def test_tied_and_turned_tensors_keep_their_names_and_values(tmp_path: Path) -> None:
    folder = tmp_path / "tied"
    folder.mkdir()
    shared = torch.arange(6.0).reshape(2, 3)
    whole = {"embed": shared, "head": shared, "turned": shared.T, "one": torch.tensor(3), "half": shared.bfloat16()}
    torch.save(whole, folder / "pytorch_model.bin")
    found = load_file(with_safetensors(folder) / "model.safetensors")
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in whole.items())


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is damaged or no PyTorch file"),
        (b"no pickle at all", "(damaged|pickled code)"),
        (b"PK\x03\x04 half a zip", "(damaged|pickled code)"),
    ],
)
def test_a_file_that_is_no_pickle_is_refused(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        with_safetensors(tmp_path)


def test_a_file_that_holds_more_than_weights_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1), "epoch": 3}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="holds 'epoch', which is no tensor"):
        with_safetensors(tmp_path)
