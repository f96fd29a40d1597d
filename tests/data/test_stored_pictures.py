"""Prepared data of earlier versions, which used pictures as they were stored."""

from __future__ import annotations

import io
import json

import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep.shards import dataset_fingerprint, write_shards
from pipeline.data import stored_pictures
from pipeline.data.sample import Sample
from pipeline.data.shards import DATASET_FILE, IndexedShards
from pipeline.data.stored_pictures import CHANGED, require_upright
from pipeline.errors import UserError


def split(folder, orientation):
    """Three prepared samples, the second with this orientation."""
    samples = []
    for number in range(3):
        exif = Image.Exif()
        exif[0x0112] = orientation if number == 1 else 1
        buffer = io.BytesIO()
        Image.new("RGB", (6, 4), (number, 0, 0)).save(buffer, "JPEG", exif=exif)
        samples.append(Sample(f"s{number}", buffer.getvalue(), "q", "a"))
    return write_shards(lambda start: iter(samples[start:]), folder, 2, "source", "T", "train")


def made_before(folder):
    """Take away what earlier versions did not write."""
    path = folder / DATASET_FILE
    description = json.loads(path.read_text())
    del description[CHANGED]
    description["fingerprint"] = dataset_fingerprint(description["shards"])
    path.write_text(json.dumps(description))
    return description


def test_turned_pictures_are_counted_and_make_other_data_of_the_same_files(tmp_path):
    description, _ = split(tmp_path, 6)
    assert description[CHANGED] == 1
    assert description["fingerprint"] != dataset_fingerprint(description["shards"])
    assert IndexedShards(tmp_path).sizes.tolist() == [[6, 4], [4, 6], [6, 4]]


def test_ordinary_pictures_keep_their_fingerprint(tmp_path):
    description, _ = split(tmp_path, 1)
    assert description[CHANGED] == 0 and description["fingerprint"] == dataset_fingerprint(description["shards"])


def test_data_of_an_earlier_version_with_ordinary_pictures_goes_on_and_is_looked_at_once(tmp_path):
    split(tmp_path, 1)
    made_before(tmp_path)
    require_upright(IndexedShards(tmp_path))
    assert IndexedShards(tmp_path).description[CHANGED] == 0
    assert split(tmp_path, 1)[1] is False


def test_data_of_an_earlier_version_with_turned_pictures_is_refused_by_name_and_prepared_anew(tmp_path):
    split(tmp_path, 6)
    path = tmp_path / "index.parquet"
    made_before(tmp_path)
    table = pq.read_table(path)
    fingerprint = json.loads((tmp_path / DATASET_FILE).read_text())["fingerprint"]
    pq.write_table(table.replace_schema_metadata({"dataset_fingerprint": fingerprint}), path)
    with pytest.raises(UserError, match=r"1 pictures in .*'s1'.*prepare RECIPE"):
        require_upright(IndexedShards(tmp_path))
    description, wrote = split(tmp_path, 6)
    assert wrote and description[CHANGED] == 1


def test_what_was_found_of_old_data_is_not_noted_in_data_that_took_its_place_meanwhile(tmp_path):
    split(tmp_path, 1)
    made_before(tmp_path)
    old = IndexedShards(tmp_path)
    (tmp_path / DATASET_FILE).unlink()
    split(tmp_path, 6)  # another process: the pictures of the source were replaced
    stored_pictures._note(tmp_path / DATASET_FILE, old.fingerprint)
    assert IndexedShards(tmp_path).description[CHANGED] == 1
