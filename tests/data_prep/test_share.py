"""Preparing with several processes gives what one process gives, and goes on where any of them stopped."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from data_prep.prepare import prepare
from data_prep.share import Share, join_shards, share_keys, share_shards
from pipeline.config import Recipe
from pipeline.data.shards import DATASET_FILE, INDEX_FILE, KEYS_FILE, SHARD_NAME
from pipeline.errors import UserError

EXACT = (DATASET_FILE, INDEX_FILE, *(SHARD_NAME.format(number) for number in range(3)))
MakeRecipe = Callable[..., Recipe]


def content(folder: Path) -> dict[str, str]:
    """Hashes of all files of a prepared folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def together(recipe: Recipe, count: int) -> None:
    """All shares one after the other, with what stands between and after them."""
    for number in range(count, 0, -1):
        share_shards(recipe, Share(number, count))
    join_shards(recipe)
    for number in range(count, 0, -1):
        share_keys(recipe, Share(number, count))


@given(shards=st.integers(0, 200), count=st.integers(1, 50))
def test_every_shard_belongs_to_one_share(shards: int, count: int) -> None:
    assert [number for one in range(1, count + 1) for number in Share(one, count).of(shards)] == list(range(shards))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_several_processes_write_what_one_writes(recipe: MakeRecipe, tmp_path: Path, count: int) -> None:
    prepare(recipe(), progress=False)
    shared = recipe(prepared=str(tmp_path / "shared"))
    together(shared, count)
    assert all(set(split["wrote"]) <= {"keys"} for split in prepare(shared, progress=False)["splits"])
    one, several = (
        {name: value for name, value in content(tmp_path / folder).items() if name.rpartition("/")[2] in EXACT}
        for folder in ("prepared", "shared")
    )
    assert several == one
    assert len(one) > 2 * 3
    for split in ("train", "test"):
        keys = [load_file(tmp_path / folder / "Shapes" / split / KEYS_FILE) for folder in ("prepared", "shared")]
        for name, value in keys[0].items():
            # An image may have been encoded in another batch, which rounds otherwise.
            torch.testing.assert_close(keys[1][name].float(), value.float(), atol=2e-3, rtol=2e-3)


def test_a_repeated_share_writes_nothing_and_a_missing_one_is_made_up_for(recipe: MakeRecipe) -> None:
    shared = recipe()
    assert share_shards(shared, Share(2, 3)) == 2  # of three shards for training and two for testing
    assert share_shards(shared, Share(2, 3)) == 0
    assert join_shards(shared) == 12
    assert share_keys(shared, Share(1, 2)) == 2
    assert share_keys(shared, Share(1, 2)) == 0
    prepare(shared, progress=False)
    assert share_shards(shared, Share(1, 1)) == share_keys(shared, Share(1, 1)) == 0


def test_a_shard_of_another_source_is_written_again(recipe: MakeRecipe, tmp_path: Path) -> None:
    shared = recipe()
    share_shards(shared, Share(1, 1))
    image = next((tmp_path / "coin" / "images").iterdir())
    image.write_bytes(image.read_bytes() + b"\n")
    assert share_shards(shared, Share(1, 1)) > 0


def test_a_bad_record_cannot_be_left_out_by_one_of_several(recipe: MakeRecipe, tmp_path: Path) -> None:
    for image in (tmp_path / "coin" / "images").iterdir():
        image.unlink()
    with pytest.raises(UserError, match=r"does not exist.*cannot leave records out"):
        share_shards(recipe(skip_bad=9), Share(1, 2))


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "a/b", "1/0"])
def test_a_wrong_share_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="expected NUMBER/COUNT"):
        Share.parse(text)
