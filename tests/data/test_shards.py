from __future__ import annotations

import functools
import http.server
import json
import pickle
import shutil
from pathlib import Path
from typing import cast

import pyarrow.parquet as pq
import pytest
from torch.utils.data import DataLoader, Dataset

from data_prep.shards import write_shards
from pipeline.data.sample import Sample
from pipeline.data.shards import IndexedShards
from pipeline.data.stream import stream
from pipeline.errors import UserError
from tests.loopback import Handler, serving

PREPARE = r"python -m pipeline prepare RECIPE"


def _tars(folder: Path) -> list[str]:
    return [str(path) for path in sorted(folder.glob("shard-*.tar"))]


def test_random_access_gives_back_every_sample(prepared, samples):
    shards = IndexedShards(prepared)
    backwards = [shards[i] for i in reversed(range(len(shards)))]
    assert backwards == samples[::-1]
    assert shards.ids == [sample.id for sample in samples]


def test_lengths_are_those_of_question_and_answer(prepared, samples):
    assert IndexedShards(prepared).lengths.tolist() == [len(s.question) + len(s.answer) for s in samples]


def test_streaming_local_paths_gives_the_same_samples_in_the_same_order(prepared, samples):
    assert list(stream(_tars(prepared))) == samples


def test_streaming_a_pipe_gives_the_same_samples(prepared, samples):
    assert list(stream([f"pipe:cat {path}" for path in _tars(prepared)])) == samples


@pytest.mark.skipif(
    shutil.which("curl") is None, reason="webdataset fetches http urls with curl, which is not installed"
)
def test_streaming_http_gives_the_same_samples(prepared, samples):
    class Quiet(Handler, http.server.SimpleHTTPRequestHandler):
        pass

    with serving(functools.partial(Quiet, directory=str(prepared))) as address:
        assert list(stream([f"{address}/{Path(path).name}" for path in _tars(prepared)])) == samples


def test_reading_survives_forked_workers_after_a_read_in_the_parent(prepared, samples):
    shards = IndexedShards(prepared)
    assert shards[0] == samples[0]
    data = cast("Dataset[Sample]", shards)  # which needs no base class for that
    loader: DataLoader[Sample] = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert list(loader) == samples
    assert shards[5] == samples[5]


def test_a_pickled_reader_opens_its_own_files(prepared, samples):
    shards = IndexedShards(prepared)
    assert shards[3] == samples[3]
    assert pickle.loads(pickle.dumps(shards))[3] == samples[3]


def test_a_folder_that_was_never_prepared_says_what_prepares_it(tmp_path):
    with pytest.raises(UserError, match=rf"holds no prepared data.*{PREPARE}"):
        IndexedShards(tmp_path)


def test_a_truncated_shard_is_named_with_found_and_expected_bytes(prepared):
    shard = prepared / "shard-000001.tar"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match=rf"shard-000001\.tar has {size - 100} bytes, expected {size}.*{PREPARE}"):
        IndexedShards(prepared)


def test_a_missing_shard_is_named(prepared):
    (prepared / "shard-000002.tar").unlink()
    with pytest.raises(UserError, match=rf"shard-000002\.tar is missing.*{PREPARE}"):
        IndexedShards(prepared)


def test_a_missing_index_is_named(prepared):
    (prepared / "index.parquet").unlink()
    with pytest.raises(UserError, match=rf"index\.parquet is missing.*{PREPARE}"):
        IndexedShards(prepared)


def test_a_damaged_index_is_named(prepared):
    (prepared / "index.parquet").write_bytes((prepared / "index.parquet").read_bytes()[:500])
    with pytest.raises(UserError, match=rf"index\.parquet cannot be read.*{PREPARE}"):
        IndexedShards(prepared)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 1}', '{"format": 99}'])
def test_a_damaged_description_is_named(prepared, content):
    (prepared / "dataset.json").write_text(content)
    with pytest.raises(UserError, match=rf"dataset\.json .*{PREPARE}"):
        IndexedShards(prepared)


def _another(samples: list[Sample], folder: Path) -> Path:
    """A dataset of the same sizes with two samples exchanged."""
    changed = [samples[4], *samples[1:4], samples[0], *samples[5:]]
    write_shards(lambda start: changed[start:], folder, 4, "other", "Shapes", "train")
    return folder


def test_an_index_of_another_dataset_is_refused(prepared, samples, tmp_path):
    shutil.copy(_another(samples, tmp_path / "other") / "index.parquet", prepared)
    with pytest.raises(UserError, match=rf"belongs to another dataset.*{PREPARE}"):
        IndexedShards(prepared)


def test_a_shard_of_another_dataset_of_the_same_size_is_refused_on_reading(prepared, samples, tmp_path):
    other = _another(samples, tmp_path / "other") / "shard-000000.tar"
    assert other.stat().st_size == (prepared / "shard-000000.tar").stat().st_size
    shutil.copy(other, prepared)
    with pytest.raises(UserError, match=rf"shard-000000\.tar does not hold sample 'set/0\.v1'.*{PREPARE}"):
        IndexedShards(prepared)[0]


def test_the_index_has_the_documented_columns(prepared):
    index = pq.read_table(prepared / "index.parquet").to_pylist()
    first, without = index[0], index[3]
    assert (first["image_format"], first["width"], first["height"]) == ("PNG", 20, 12)
    assert without["image_offset"] is without["image_size"] is without["image_format"] is None
    assert [row["shard"] for row in index] == [0] * 4 + [1] * 4 + [2] * 3


def test_the_offsets_need_no_tar_reader(prepared, samples):
    row = pq.read_table(prepared / "index.parquet").to_pylist()[5]
    content = (prepared / f"shard-{row['shard']:06d}.tar").read_bytes()
    assert content[row["image_offset"] :][: row["image_size"]] == samples[5].image
    assert json.loads(content[row["json_offset"] :][: row["json_size"]])["id"] == samples[5].id
