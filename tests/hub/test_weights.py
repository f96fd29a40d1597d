"""What is known of weights without loading them: which are missing, damaged, or another model's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.backbones.base_model import fingerprint
from pipeline.errors import UserError
from pipeline.hub.snapshots import Source
from pipeline.hub.weights import INDEX, SCHEME, file_fingerprints, tensors_fingerprint, tensors_of, weights_of
from pipeline.runs.recorded import recorded_base_model
from tests import tiny

LARGE = 3 << 20  # bytes before and behind the tensor in the middle: more than the first and last MiB


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A checkpoint whose middle tensor is neither in the first nor in the last MiB of its file."""
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save(folder, torch.zeros(64))
    return folder


def save(folder: Path, middle: torch.Tensor, name: str = "model.safetensors") -> None:
    around = torch.zeros(LARGE, dtype=torch.uint8)
    save_file({"a": around, "b": middle.view(torch.uint8), "c": around.clone()}, folder / name, {"format": "pt"})


def test_one_tensor_that_changed_in_the_middle_of_a_file_is_another_model(large: Path) -> None:
    before, earlier = tensors_fingerprint(large), file_fingerprints(large)
    save(large, torch.full((64,), 1e-3))
    assert tensors_fingerprint(large) != before
    assert file_fingerprints(large) == earlier, "which is why there is another scheme"


def test_the_end_and_the_middle_of_a_large_tensor_count(large: Path) -> None:
    seen = {tensors_fingerprint(large)}
    start = tensors_of(large)["a"].start
    for place in (start, start + LARGE // 2, start + LARGE - 1):
        content = bytearray((large / "model.safetensors").read_bytes())
        content[place] ^= 1
        (large / "model.safetensors").write_bytes(content)
        seen.add(tensors_fingerprint(large))
    assert len(seen) == 4


def test_the_same_tensors_in_several_files_are_the_same_model(tmp_path: Path) -> None:
    folder = tiny.save_llava(tmp_path / "one")
    other = shutil.copytree(folder, tmp_path / "several")
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    index: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, other / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    (other / "model.safetensors").unlink()
    (other / INDEX).write_text(json.dumps({"weight_map": index}))
    assert tensors_fingerprint(other) == tensors_fingerprint(folder)


def test_a_file_that_the_index_names_and_that_is_not_there_is_an_error(large: Path) -> None:
    (large / "model.safetensors").rename(large / "model-00001-of-00002.safetensors")
    files = {"a": "model-00001-of-00002.safetensors", "d": "model-00002-of-00002.safetensors"}
    (large / INDEX).write_text(json.dumps({"weight_map": files}))
    assert weights_of(large).missing == ["model-00002-of-00002.safetensors"]
    with pytest.raises(UserError, match=r"lacks weights \(model-00002-of-00002\.safetensors\)"):
        tensors_fingerprint(large)


def test_a_tensor_that_the_index_names_and_no_file_has_is_an_error(large: Path) -> None:
    (large / INDEX).write_text(json.dumps({"weight_map": {"a": "model.safetensors", "d": "model.safetensors"}}))
    with pytest.raises(UserError, match=r"have not 1 of the tensors that .* names, for example d"):
        tensors_fingerprint(large)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_file_that_was_cut_off_is_an_error(large: Path, keep: int) -> None:
    content = (large / "model.safetensors").read_bytes()
    (large / "model.safetensors").write_bytes(content[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors .*(cut off|not a whole)"):
        tensors_fingerprint(large)


def test_what_an_earlier_version_recorded_of_the_same_model_still_counts(large: Path) -> None:
    source = Source(str(large))
    recorded = file_fingerprints(large)[0]
    assert fingerprint(source, recorded) == recorded
    assert fingerprint(source).startswith(SCHEME)
    assert fingerprint(source, "another") == fingerprint(source)
    save(large, torch.ones(64, dtype=torch.float64))
    assert fingerprint(source, recorded) != recorded


def test_a_fingerprint_from_before_the_weights_were_fetched_still_counts_and_is_said(
    large: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = (large / "model.safetensors").read_bytes()
    (large / "model.safetensors").unlink()
    recorded = file_fingerprints(large)[0]
    (large / "model.safetensors").write_bytes(weights)
    assert fingerprint(Source(str(large)), recorded) == recorded
    assert "covers config.json only, because its weights had not been fetched" in caplog.text


def test_the_recorded_model_is_found_in_stages_and_answers(tmp_path: Path) -> None:
    assert recorded_base_model(tmp_path) is None
    answers = tmp_path / "eval" / "zero-shot"
    answers.mkdir(parents=True)
    (answers / "T0.score.json").write_text(json.dumps({"made_with": {"base_model": "of answers"}}))
    assert recorded_base_model(tmp_path) == "of answers"
    (tmp_path / "stages" / "01-T0").mkdir(parents=True)
    (tmp_path / "stages" / "01-T0" / "meta.json").write_text(json.dumps({"base_model": "of a stage"}))
    assert recorded_base_model(tmp_path) == "of a stage"
