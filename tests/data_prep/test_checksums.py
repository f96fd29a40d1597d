"""A bit that turns over in prepared data is told before a wrong number comes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.prepare import prepare
from pipeline.config.recipe import Recipe
from pipeline.data.checksums import CHECKSUMS_FILE
from pipeline.data.shards import INDEX_FILE, KEYS_FILE, IndexedShards
from pipeline.errors import UserError
from tests import tiny_clip
from tests.training.worlds import make_recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """A recipe whose only task is prepared."""
    tiny_clip.save_clip(tmp_path / "clip")
    root = tiny_clip.save_coin(tmp_path / "coin", "T0", train=3, test=2)
    data = {"source": "coin", "root": str(root), "prepared": str(tmp_path / "data"), "tasks": [{"name": "T0"}]}
    recipe = make_recipe("none", data=data, keys={"path": str(tmp_path / "clip")})
    prepare(recipe, progress=False)
    return recipe


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def read(folder: Path) -> None:
    shards = IndexedShards(folder)
    shards.keys()
    assert len(list(shards)) == 3


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("file", [INDEX_FILE, KEYS_FILE])
def test_a_changed_table_is_refused_and_written_anew(recipe: Recipe, file: str, share: float) -> None:
    folder = recipe.data.split_path("T0", "train")
    flip(folder / file, int((folder / file).stat().st_size * share))
    with pytest.raises(UserError, match=rf"{file}.*prepare"):
        read(folder)
    prepare(recipe, progress=False)
    read(folder)


@pytest.mark.parametrize("member", ["_json", "_image"])
def test_a_changed_record_is_refused_by_name(recipe: Recipe, member: str) -> None:
    folder = recipe.data.split_path("T0", "train")
    offset, size = getattr(IndexedShards(folder), member)[1]
    flip(folder / "shard-000000.tar", int(offset + size // 2))
    shards = IndexedShards(folder)
    assert shards[0].id and shards[2].id
    with pytest.raises(UserError, match=r"'T0-1'.*was changed.*Remove the folder"):
        shards[1]


def test_data_of_an_earlier_version_is_read_unchecked_until_it_is_prepared_again(recipe: Recipe) -> None:
    folder = recipe.data.split_path("T0", "train")
    (folder / CHECKSUMS_FILE).unlink()
    read(folder)
    assert all(not split["wrote"] for split in prepare(recipe, progress=False)["splits"])
    assert (folder / CHECKSUMS_FILE).is_file()


def test_damaged_checksums_are_refused_with_what_to_do(recipe: Recipe) -> None:
    folder = recipe.data.split_path("T0", "train")
    flip(folder / CHECKSUMS_FILE, 3)
    with pytest.raises(UserError, match=rf"{CHECKSUMS_FILE}.*Remove it and run"):
        IndexedShards(folder)
