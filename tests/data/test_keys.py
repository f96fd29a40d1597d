"""Keys stay on the disk in float16 until rows of them are needed; every number is that of the whole float32 table."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import normalize

import pipeline.prompts.routers.mean as mean
from pipeline.data.collate import Examples, collate
from pipeline.data.example import Example
from pipeline.data.grouped_order import image_groups
from pipeline.data.ids import Ids
from pipeline.data.keys import AnyKeys, ChainedRows, Keys, join_keys, read_keys
from pipeline.data.stage_data import StageData
from pipeline.prompts.pool import PromptPool
from tests.training.worlds import make_recipe, make_samples

PROJECT = Path(__file__).resolve().parents[2]
WIDTH = 160

ANONYMOUS = """
import sys
from pathlib import Path
from pipeline.data.keys import join_keys, read_keys
def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
count = int(sys.argv[2])
before = anonymous()
keys = [read_keys(Path(sys.argv[1]), {"fingerprint": "f", "count": count}) for _ in range(2)]
joined = join_keys([(part, count) for part in keys])
total = sum(float(part.sum()) for part in joined.image.split(1 << 12))
print(anonymous() - before)
"""


def stored(count: int, seed: int = 0) -> Keys:
    """Keys as a prepared split has them: float16, some samples without an image."""
    generator = torch.Generator().manual_seed(seed)
    flags = torch.rand(count, generator=generator) > 0.2
    image = (torch.randn(count, WIDTH, generator=generator) * flags[:, None]).half()
    return Keys(image, torch.randn(count, WIDTH, generator=generator).half(), flags, {})


def in_float32(keys: AnyKeys) -> Keys:
    """The same keys as they were held before: whole and in float32."""
    image, text = (torch.cat(list(rows.split(1000))).float() for rows in (keys.image, keys.text))
    return Keys(image, text, keys.has_image, {})


def save(folder: Path, keys: Keys) -> None:
    tensors = {"image": keys.image, "text": keys.text, "has_image": keys.has_image.to(torch.uint8)}
    save_file(tensors, folder / "keys.safetensors", {"dataset_fingerprint": "f"})


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of this test is as large for the code as one of millions of rows."""
    for module in ("pipeline.prompts.routers.mean", "pipeline.prompts.routing"):
        monkeypatch.setattr(f"{module}.SAMPLES_AT_ONCE", 256)
    monkeypatch.setattr(mean, "SUMMED_BYTES", 4096)


def test_keys_of_a_split_are_read_as_they_lie_on_the_disk(tmp_path: Path) -> None:
    keys = stored(50)
    save(tmp_path, keys)
    read = read_keys(tmp_path, {"fingerprint": "f", "count": 50})
    assert read.image.dtype == read.text.dtype == torch.float16
    assert torch.equal(read.image, keys.image)
    assert torch.equal(read.has_image, keys.has_image)


def test_mapped_keys_take_no_memory_of_the_process(tmp_path: Path) -> None:
    count = 60_000
    save(tmp_path, stored(count))
    megabytes = 2 * 2 * count * WIDTH * 2 / 1e6  # two parts, two tables
    done = subprocess.run(
        [sys.executable, "-c", ANONYMOUS, str(tmp_path), str(count)], cwd=PROJECT, capture_output=True, text=True
    )
    assert int(done.stdout) * 1024 / 1e6 < megabytes / 4, done.stderr[-2000:]


def test_one_part_is_not_copied_and_several_are_chained() -> None:
    one, other = stored(7), stored(5, seed=1)
    alone = join_keys([(one, 6)])
    assert isinstance(alone.image, torch.Tensor)
    assert alone.image.data_ptr() == one.image.data_ptr()
    both = join_keys([(one, 6), (other, 5)])
    assert isinstance(both.image, ChainedRows)
    whole = torch.cat([one.image[:6], other.image])
    index = torch.tensor([10, 0, 6, 5, 0])
    assert torch.equal(both.image[index], whole[index])
    for rows in (1, 4, 6, 50):
        assert [len(part) for part in both.image.split(rows)] == [len(part) for part in whole.split(rows)]
        assert torch.equal(torch.cat(list(both.image.split(rows))), whole)


@pytest.mark.parametrize("parts", [1, 3])
def test_similarities_are_those_of_the_whole_table_in_float32(small_parts: None, parts: int) -> None:
    keys = join_keys([(stored(1001, seed), 1001) for seed in range(parts)])
    prototypes, whole = torch.randn(5, WIDTH), in_float32(keys)
    expected = mean.similarity(whole.image, whole.text, prototypes, 0.3, whole.has_image)
    assert torch.equal(mean.similarities(keys, prototypes, 0.3), expected)


@pytest.mark.parametrize("parts", [1, 3])
def test_the_provisional_prototype_is_that_of_the_whole_table_in_float32(small_parts: None, parts: int) -> None:
    keys = join_keys([(stored(1001, seed), 1001) for seed in range(parts)])
    whole = in_float32(keys)
    image_weight, text_weight = mean.prototype_term_weights(whole.has_image)
    total = (image_weight[:, None] * normalize(whole.image, dim=-1)).sum(0)
    total = total + (text_weight[:, None] * normalize(whole.text, dim=-1)).sum(0)
    found = mean.provisional_prototype(keys.image, keys.text, keys.has_image)
    assert torch.equal(found, normalize(total, dim=-1))


@pytest.mark.parametrize("parts", [1, 3])
def test_training_selections_are_those_of_the_whole_table_in_float32(small_parts: None, parts: int) -> None:
    from pipeline.methods import make_method

    keys = join_keys([(stored(1001, seed), 1001) for seed in range(parts)])
    pool = PromptPool()
    for number in range(4):
        prototype = torch.randn(WIDTH, generator=torch.Generator().manual_seed(number))
        pool.append(f"t{number}", {"prompt": torch.zeros(4, 8)}, {"prototype": prototype})
    method = make_method(make_recipe("none", method__gate=0.05).method)
    found = [method.routing.training(each, pool.states).numbers for each in (keys, in_float32(keys))]
    assert torch.equal(*found)


def test_images_are_numbered_in_the_order_in_which_they_appear() -> None:
    keys = stored(40)
    image = keys.image[torch.tensor([3, 1, 3, 0, 1, 2] * 5)]
    flags = torch.tensor([True, True, True, True, True, False] * 5)
    groups = image_groups(Keys(image, image, flags, {}))
    seen: dict[object, int] = {}
    rows = [
        row.numpy().tobytes() if has else number for number, (row, has) in enumerate(zip(image, flags, strict=True))
    ]
    assert groups.tolist() == [seen.setdefault(row, len(seen)) for row in rows]
    assert groups.dtype == np.int64


def test_batches_have_their_keys_in_float32() -> None:
    samples, _ = make_samples(6)
    keys, pixels = stored(6), {"pixel_values": torch.zeros(1, 3, 4, 4)}
    ready = [Example(name, [1, 5], [2], pixels) for name in samples.ids]
    conversation: Any = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0), blank=pixels)
    examples = Examples(StageData([(samples, keys, None)]), conversation, ready=ready)
    batch = collate(examples, [4, 2], [1.0, 1.0], torch.zeros(6, 0, dtype=torch.long))
    assert torch.equal(batch.image_key, in_float32(keys).image[torch.tensor([4, 2])])
    assert batch.text_key.dtype == torch.float32


def test_ids_read_like_a_list_and_slices_share_its_memory() -> None:
    ids = Ids(["a", "b", "c", "d"])
    assert (ids[0], ids[-1], list(ids[1:3]), len(ids)) == ("a", "d", ["b", "c"], 4)
    assert Ids.joined([ids[:2], ["x"]]) == ["a", "b", "x"]
    assert ids != ["a", "b", "c"]
    with pytest.raises(IndexError):
        ids[4]
