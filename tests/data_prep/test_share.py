"""Preparing with several processes gives what one process gives, and goes on where any of them stopped."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from data_prep.prepare import prepare
from data_prep.share import Share, join_shards, share_keys, share_shards
from data_prep.sources import image_states
from pipeline.config.recipe import Recipe
from pipeline.data.shards import DATASET_FILE, INDEX_FILE, KEYS_FILE, SHARD_NAME, IndexedShards
from pipeline.errors import UserError
from tests.tiny_clip import picture

EXACT = (DATASET_FILE, INDEX_FILE, *(SHARD_NAME.format(number) for number in range(3)))
MakeRecipe = Callable[..., Recipe]


def content(folder: Path) -> dict[str, str]:
    """Hashes of all files of a prepared folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def together(recipe: Recipe, count: int) -> None:
    """All shares one after the other, with what stands between and after them."""
    for number in range(count, 0, -1):
        share_shards(recipe.data, Share(number, count))
    join_shards(recipe.data)
    for number in range(count, 0, -1):
        share_keys(recipe.data, recipe.keys, Share(number, count))


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
    assert share_shards(shared.data, Share(2, 3)) == 2  # of three shards for training and two for testing
    assert share_shards(shared.data, Share(2, 3)) == 0
    assert join_shards(shared.data) == 12
    assert share_keys(shared.data, shared.keys, Share(1, 2)) == 2
    assert share_keys(shared.data, shared.keys, Share(1, 2)) == 0
    prepare(shared, progress=False)
    assert share_shards(shared.data, Share(1, 1)) == share_keys(shared.data, shared.keys, Share(1, 1)) == 0


def test_a_shard_of_another_source_is_written_again(recipe: MakeRecipe, tmp_path: Path) -> None:
    shared = recipe()
    share_shards(shared.data, Share(1, 1))
    table = tmp_path / "coin" / "instructions" / "Shapes" / "train.json"
    table.write_bytes(table.read_bytes() + b"\n")
    assert share_shards(shared.data, Share(1, 1)) > 0


def test_the_first_process_asks_for_every_image_and_the_others_take_its_word(
    recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    ask = image_states.image_states

    def counted(images: Iterable[str], folders: Sequence[Path]) -> dict[str, image_states.ImageState | None]:
        found = ask(images, folders)
        asked.append(len(found))
        return found

    monkeypatch.setattr("data_prep.sources.base.image_states", counted)
    shared = recipe()
    for number in (1, 2, 3):
        share_shards(shared.data, Share(number, 3))
    join_shards(shared.data)
    assert len(asked) == 2  # splits


def test_an_image_that_changes_under_an_array_is_noticed_by_the_prepare_that_ends_it(
    recipe: MakeRecipe, tmp_path: Path
) -> None:
    shared = recipe()
    share_shards(shared.data, Share(1, 1))
    for path in (tmp_path / "coin" / "images").glob("Shapes-train-*.png"):
        path.write_bytes(picture(77))
    join_shards(shared.data)
    train, test = prepare(shared, progress=False)["splits"]
    assert (train["wrote"], test["wrote"]) == (["shards", "keys"], ["keys"])
    assert IndexedShards(shared.data.split_path("Shapes", "train"))[1].image == picture(77)


def test_an_array_does_not_rewrite_what_is_prepared(recipe: MakeRecipe, tmp_path: Path) -> None:
    prepare(recipe(), progress=False)
    table = tmp_path / "coin" / "instructions" / "Shapes" / "train.json"
    table.write_bytes(table.read_bytes() + b"\n")
    with pytest.raises(UserError, match="was prepared from another state of the source or by another recipe"):
        share_shards(recipe().data, Share(1, 1))


def test_an_array_with_shards_of_another_size_does_not_touch_those_that_are_there(recipe: MakeRecipe) -> None:
    whole = recipe()
    prepare(whole, progress=False)
    folder = whole.data.split_path("Shapes", "train")
    before = content(folder)
    with pytest.raises(UserError, match=r"in shards of 3 samples, and data\.shard_samples is 2"):
        share_shards(recipe(shard_samples=2).data, Share(1, 1))
    assert content(folder) == before


def test_a_bad_record_cannot_be_left_out_by_one_of_several(recipe: MakeRecipe, tmp_path: Path) -> None:
    for image in (tmp_path / "coin" / "images").iterdir():
        image.unlink()
    with pytest.raises(UserError, match=r"does not exist.*cannot leave records out"):
        share_shards(recipe(skip_bad=9).data, Share(1, 2))


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "a/b", "1/0"])
def test_a_wrong_share_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="expected NUMBER/COUNT"):
        Share.parse(text)
