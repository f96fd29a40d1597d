"""A synthetic CoIN of any size: the eight tasks in their real proportions, with tiny JPEGs and random content.

`write_coin` writes the input of `prepare`, `write_prepared` its output, for sizes whose images would fill a disk.
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from safetensors.numpy import save_file

from data_prep.shards import dataset_fingerprint, write_shards
from pipeline.data.sample import Sample
from pipeline.data.shards import DATASET_FILE, FINGERPRINT, INDEX_FILE, KEYS_FILE, SHARD_NAME, read_description

# Training and test records of each task in CoIN's files.
COIN = {
    "ScienceQA": (12_726, 4_241),
    "TextVQA": (34_602, 5_000),
    "ImageNet": (117_715, 5_050),
    "GQA": (72_140, 12_578),
    "VizWiz": (20_523, 8_000),
    "Grounding": (111_770, 31_000),
    "VQAv2": (82_783, 214_354),
    "OCRVQA": (165_348, 100_032),
}
RECORDS_PER_IMAGE = 1.74  # 958 thousand records for about 550 thousand images
DRAWN = 256  # distinct pictures; further files differ by a few bytes after the end of the picture
DISTINCT_KEYS = 4096  # distinct rows of keys per split, which are repeated
SHARD_SAMPLES = 1000

Counts = dict[str, tuple[int, int]]


def counts_of(records: int) -> Counts:
    """Numbers of training and test records of each task for a total number; at least eight each."""
    whole = sum(map(sum, COIN.values()))
    return {
        name: (max(8, round(train * records / whole)), max(8, round(test * records / whole)))
        for name, (train, test) in COIN.items()
    }


def write_coin(root: Path, counts: Counts) -> int:
    """Write a CoIN folder with JSON and images for all tasks; returns the number of images."""
    pictures = [tiny_jpeg(number) for number in range(DRAWN)]
    images = 0
    for task, sizes in counts.items():
        (root / "instructions" / task).mkdir(parents=True, exist_ok=True)
        for split, count in zip(("train", "test"), sizes, strict=True):
            folder = root / "datasets" / task / split
            folder.mkdir(parents=True, exist_ok=True)
            distinct = max(1, round(count / RECORDS_PER_IMAGE))
            for number in range(distinct):
                body = pictures[number % DRAWN] + b"%s %s %d" % (task.encode(), split.encode(), number)
                (folder / f"{number:09d}.jpg").write_bytes(body)
            images += distinct
            with (root / "instructions" / task / f"{split}.json").open("w", encoding="utf-8") as file:
                for number in range(count):
                    file.write("[" if number == 0 else ",\n")
                    file.write(json.dumps(_entry(task, split, number, number % distinct)))
                file.write("]\n")
    return images


def _entry(task: str, split: str, number: int, image: int) -> dict[str, object]:
    picture = {} if _stands_alone(task, number) else {"image": f"datasets/{task}/{split}/{image:09d}.jpg"}
    if split == "train":
        turns = [
            {"from": "human", "value": f"<image>\n{_question(number)}" if picture else _question(number)},
            {"from": "gpt", "value": _answer(number)},
        ]
        return {"id": _id(number), **picture, "conversations": turns}
    return {"question_id": _id(number), **picture, "text": _question(number), "answer": _answer(number)}


def _stands_alone(task: str, number: int) -> bool:
    """Half of ScienceQA's questions have no image."""
    return task == "ScienceQA" and number % 2 == 1


def _id(number: int) -> str:
    return f"{number:012d}"


def _question(number: int) -> str:
    return f"What is the {number % 997}th thing that can be seen here?\nAnswer with a single word or phrase."


def _answer(number: int) -> str:
    return f"thing {number % 97}"


def tiny_jpeg(seed: int) -> bytes:
    """A picture of less than a kilobyte, different for every seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((48, 32)).save(buffer, "JPEG", quality=60)
    return buffer.getvalue()


def write_keys_of(folder: Path, identity: dict[str, str], width: int, has_image: npt.NDArray[np.bool_]) -> None:
    """Write generated keys [N, width] for a split with shards; no CLIP is run."""
    count = len(has_image)
    seed = int.from_bytes(folder.parent.name.encode(), "little") % 2**32  # tasks lie apart
    centre = np.random.default_rng(seed).standard_normal((2, 1, width)).astype(np.float16)
    drawn = np.random.default_rng(seed + 1).standard_normal((2, min(count, DISTINCT_KEYS), width)).astype(np.float16)
    image, text = (np.resize(part, (count, width)) for part in centre + drawn / 2)
    image[~has_image] = 0
    fingerprint = read_description(folder)["fingerprint"]
    facts = {**identity, "dtype": "float16", "normalised": "no", FINGERPRINT: fingerprint}
    save_file({"image": image, "text": text, "has_image": has_image.astype(np.uint8)}, folder / KEYS_FILE, facts)


def write_prepared(root: Path, counts: Counts, identity: dict[str, str], width: int) -> None:
    """Write prepared splits of all tasks: indices and keys of every record, and one shard that all shards link to.

    Every shard repeats the records of the split's first shard, ids included, so that all records can be read.
    """
    for task, sizes in counts.items():
        for split, count in zip(("train", "test"), sizes, strict=True):
            _write_linked(root / task / split, task, split, count)
            alone = np.array([_stands_alone(task, number) for number in range(SHARD_SAMPLES)])
            write_keys_of(root / task / split, identity, width, ~np.resize(alone, count))


def _write_linked(folder: Path, task: str, split: str, count: int) -> None:
    def read(start: int) -> list[Sample]:
        return [
            Sample(
                _id(number),
                None if _stands_alone(task, number) else tiny_jpeg(number % DRAWN) + b"%d" % number,
                _question(number),
                _answer(number),
            )
            for number in range(start, min(count, SHARD_SAMPLES))
        ]

    write_shards(read, folder, SHARD_SAMPLES, "generated", task, split)
    description = read_description(folder)
    first = description["shards"][0]
    for number in range(1, -(-count // SHARD_SAMPLES)):
        os.link(folder / first["name"], folder / SHARD_NAME.format(number))
        samples = min(SHARD_SAMPLES, count - number * SHARD_SAMPLES)
        description["shards"].append({**first, "name": SHARD_NAME.format(number), "samples": samples})
    description |= {"count": count, "fingerprint": dataset_fingerprint(description["shards"])}
    rows = np.arange(count)
    index = pq.read_table(folder / INDEX_FILE)
    shard = pa.array(rows // SHARD_SAMPLES, index.schema.field("shard").type)
    index = index.take(pa.array(rows % SHARD_SAMPLES)).set_column(index.schema.names.index("shard"), "shard", shard)
    index = index.replace_schema_metadata({FINGERPRINT: description["fingerprint"]})
    pq.write_table(index, folder / INDEX_FILE)
    (folder / DATASET_FILE).write_text(json.dumps(description), "utf-8")
