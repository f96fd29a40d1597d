"""Computes the routing keys of a prepared split: CLIP vectors of each sample's image and question, once per split.

`keys.safetensors` (float16, row i belongs to index row i) is for training, `keys.parquet` (with ids) for analysis.
See docs/design.md 4.3 and 7.6.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data_prep.parallel import ordered_map
from pipeline.backbones.key_encoders import key_encoder
from pipeline.data.origin import REMEDY
from pipeline.data.sample import decode_image
from pipeline.data.shards import FINGERPRINT, IDENTITY_FIELDS, KEYS_FILE, KEYS_TABLE, IndexedShards
from pipeline.errors import UserError
from pipeline.files.atomic import replacing
from pipeline.ranks.heap import keep_freed_blocks

if TYPE_CHECKING:
    from pipeline.backbones.clip import KeyEncoder
    from pipeline.config.models import KeysConfig

_PARTS = "keys-parts"  # folder of the keys of single shards while a split's keys are computed
PIXEL_BYTES = 1 << 30  # bound on preprocessed images in flight; a batch of 64 at 336 x 336 pixels has 87 MB
# Metadata of the keys, for people: "float32" or "tf32". It is not part of the identity, because keys of both precisions
# can be compared: they differ by about twice the error of rounding to float16.
PRECISION = "precision"

Tensors = dict[str, torch.Tensor]
KnownImages = dict[bytes, torch.Tensor]  # SHA-256 of the image file -> image key [K] float16
Part = TypeVar("Part")


def encoder_of(keys: KeysConfig) -> KeyEncoder:
    """The key encoder of a recipe for a process that encodes splits: on a CPU it keeps the memory of a forward pass."""
    encoder = key_encoder(*keys.source, tf32=True)
    if encoder.device.type == "cpu":
        keep_freed_blocks()
    return encoder


def write_keys(
    folder: Path,
    identity: dict[str, str],
    encoder: Callable[[], KeyEncoder],
    batch: int,
    workers: int,
    progress: Callable[[int], None] = lambda samples: None,
    known_images: KnownImages | None = None,
) -> bool:
    """Write the keys of a split unless they exist; return whether they were computed.

    An interrupted call resumes at the first shard without keys.

    Args:
        folder: the prepared split.
        identity: `key_identity` of the CLIP.
        encoder: loads the CLIP; called only when keys are missing.
        batch: images or texts per forward pass.
        workers: threads that decode and preprocess images.
        progress: called with the number of samples that were done since its last call.
        known_images: keys of images encoded so far; pass the same one for several splits, so that an image in several
            of them is encoded once.
    """
    known_images = {} if known_images is None else known_images
    shards = IndexedShards(folder)
    if _up_to_date(shards, identity):
        progress(len(shards))
        return False
    (folder / KEYS_FILE).unlink(missing_ok=True)
    metadata, parts, precisions = _metadata(shards, identity), list[Tensors](), set[str]()
    for number, rows in enumerate(_rows_of_shards(shards)):
        path = _part_file(folder, number)
        part = _read_part(path, metadata, len(rows))
        if part is None:
            tensors = _encode(shards, rows, encoder(), batch, workers, known_images)
            part = tensors, encoder().precision
            _save(path, tensors, {**metadata, PRECISION: part[1]})
        parts.append(part[0])
        precisions.add(part[1])
        progress(len(rows))
    keys = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    metadata[PRECISION] = "+".join(sorted(precisions))
    _write_table(folder / KEYS_TABLE, shards.ids, keys, metadata)
    _save(folder / KEYS_FILE, keys, metadata)
    shutil.rmtree(folder / _PARTS)
    return True


def refuse_keys_of_another(folder: Path, identity: dict[str, str]) -> None:
    """Raise UserError when a split has keys of another CLIP or of its other features, which another recipe needs."""
    shards = IndexedShards(folder)
    try:
        found = shards.keys().identity
    except UserError:
        return  # no keys, or damaged ones that no recipe can use
    if all(found.get(name) == identity[name] for name in IDENTITY_FIELDS):
        return
    raise UserError(
        f"{folder} has the keys of another CLIP ({found.get('clip')}, text {found.get('text_feature')}, "
        f"{found.get('text_truncation', 'head')} of long questions); the recipe's is {identity['clip']}, text "
        f"{identity['text_feature']}, {identity['text_truncation']}. {REMEDY}"
    )


def write_some_keys(
    folder: Path,
    identity: dict[str, str],
    encoder: Callable[[], KeyEncoder],
    batch: int,
    workers: int,
    numbers: Iterable[int],
    known_images: KnownImages | None = None,
) -> int:
    """Compute the missing keys of the shards with these numbers and return for how many shards that was.

    For several processes that share the work; `write_keys` then only merges the keys. Arguments are those of
    `write_keys`; `numbers` are the shards of this process.
    """
    shards = IndexedShards(folder)
    if _up_to_date(shards, identity):
        return 0
    metadata, rows_of_shards = _metadata(shards, identity), _rows_of_shards(shards)
    known_images = {} if known_images is None else known_images
    wrote = 0
    for number in numbers:
        path, rows = _part_file(folder, number), rows_of_shards[number]
        if _read_part(path, metadata, len(rows)) is None:
            tensors = _encode(shards, rows, encoder(), batch, workers, known_images)
            _save(path, tensors, {**metadata, PRECISION: encoder().precision})
            wrote += 1
    return wrote


def _metadata(shards: IndexedShards, identity: dict[str, str]) -> dict[str, str]:
    return {**identity, "dtype": "float16", "normalised": "no", FINGERPRINT: shards.fingerprint}


def _rows_of_shards(shards: IndexedShards) -> list[range]:
    ends = list(accumulate(shard["samples"] for shard in shards.description["shards"]))
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def _part_file(folder: Path, number: int) -> Path:
    return folder / _PARTS / f"keys-{number:06d}.safetensors"


def _up_to_date(shards: IndexedShards, identity: dict[str, str]) -> bool:
    try:
        shards.keys(identity)
    except UserError:
        return False
    return (shards.folder / KEYS_TABLE).is_file()


def _encode(
    shards: IndexedShards, rows: range, encoder: KeyEncoder, batch: int, workers: int, known_images: KnownImages
) -> Tensors:
    """Return the keys of one shard: image [n, K] and text [n, K] float16, has_image [n] uint8.

    Each distinct image and each distinct question is encoded once, because in visual question answering many samples
    share an image or a question.
    """
    digests: list[bytes | None] = []
    questions: list[str] = []
    for row in rows:
        sample = shards[row]
        digests.append(None if sample.image is None else hashlib.sha256(sample.image).digest())
        questions.append(sample.question)  # without the answer, which is unknown at inference

    def pixels(chunk: list[tuple[bytes, int]]) -> torch.Tensor:
        encoded = (shards[row].image for _, row in chunk)
        return encoder.pixels([decode_image(image) for image in encoded if image is not None])

    where = {digest: row for digest, row in zip(digests, rows, strict=True) if digest and digest not in known_images}
    names = iter(where)
    chunks = _chunks(list(where.items()), batch)
    for tensor in ordered_map(pixels, chunks, workers, PIXEL_BYTES, lambda tensor: tensor.nbytes):
        known_images.update(zip(islice(names, len(tensor)), encoder.image(tensor).half(), strict=True))
    blank = torch.zeros(encoder.width, dtype=torch.float16)

    asked = {question: number for number, question in enumerate(dict.fromkeys(questions))}
    text_keys = torch.cat([encoder.text(chunk) for chunk in _chunks(list(asked), batch)]).half()

    keys = {
        "image": torch.stack([known_images[digest] if digest else blank for digest in digests]),
        "text": text_keys[[asked[question] for question in questions]],
        "has_image": torch.tensor([digest is not None for digest in digests], dtype=torch.uint8),
    }
    for name in ("image", "text"):
        broken = (~keys[name].isfinite().all(dim=1)).nonzero().flatten().tolist()
        if broken:
            raise UserError(
                f"The CLIP gives no finite {name} key for sample {shards.ids[rows[broken[0]]]!r} of {shards.folder} "
                f"({len(broken)} such samples in the shard). Check the weights in keys.path."
            )
    return keys


def _chunks(items: list[Part], size: int) -> Iterable[list[Part]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _read_part(path: Path, metadata: dict[str, str], count: int) -> tuple[Tensors, str] | None:
    """The keys in a part file and their precision; None unless the file is of this dataset and CLIP."""
    try:
        with safe_open(path, framework="pt") as file:
            found = dict(file.metadata() or {})
            precision = found.pop(PRECISION, "float32")
            if found != metadata:
                return None
            part = {name: file.get_tensor(name) for name in ("image", "text", "has_image")}
    except (OSError, SafetensorError):
        return None
    return (part, precision) if all(len(tensor) == count for tensor in part.values()) else None


def _save(path: Path, keys: Tensors, metadata: dict[str, str]) -> None:
    with replacing(path) as temporary:
        save_file(keys, temporary, metadata)


def _write_table(path: Path, ids: Sequence[str], keys: Tensors, metadata: dict[str, str]) -> None:
    columns: dict[str, pa.Array] = {"id": pa.array(ids, pa.string())}
    for name in ("image", "text"):
        values = np.ascontiguousarray(keys[name].numpy())
        columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
    columns["has_image"] = pa.array(keys["has_image"].numpy().astype(bool))
    with replacing(path) as temporary:
        # Without compression and dictionary: values of embeddings hardly repeat.
        pq.write_table(
            pa.table(columns).replace_schema_metadata(metadata), temporary, compression="none", use_dictionary=False
        )
