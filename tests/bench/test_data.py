"""The synthetic CoIN is one that the project can read, and the measurements see what they are about."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from pipeline.bench.data import bench_data
from pipeline.bench.data_source import COIN, counts_of, write_coin, write_prepared
from pipeline.bench.data_watch import watch
from pipeline.data.shards import IDENTITY_FIELDS, IndexedShards
from pipeline.errors import UserError

MIB = 1 << 20
IDENTITY = dict.fromkeys(IDENTITY_FIELDS, "generated")


def test_the_records_are_shared_out_as_in_coin() -> None:
    whole = sum(map(sum, COIN.values()))
    assert counts_of(whole) == COIN
    assert counts_of(whole // 10)["OCRVQA"] == (16_535, 10_003)


def test_linked_shards_hold_every_record_of_the_index(tmp_path: Path) -> None:
    write_prepared(tmp_path, {"ScienceQA": (2_050, 8)}, IDENTITY, width=4)
    shards = IndexedShards(tmp_path / "ScienceQA" / "train")
    keys = shards.keys(IDENTITY)
    assert (len(shards), len(shards.description["shards"])) == (2_050, 3)
    assert [shards[row].id for row in (0, 1_999, 2_049)] == ["000000000000", "000000000999", "000000000049"]
    assert keys.image.shape == (2_050, 4) and keys.has_image.tolist() == [
        shards[n].image is not None for n in range(2_050)
    ]


def test_a_generated_task_is_read_as_any_other(tmp_path: Path) -> None:
    from data_prep.sources.coin import read_task

    assert write_coin(tmp_path, {"ScienceQA": (9, 8)}) == 10
    train, test = (list(read_task(tmp_path, "ScienceQA", split)) for split in ("train", "test"))
    assert (len(train), len(test)) == (9, 8)
    assert [sample.image is None for sample in train[:2]] == [False, True] and train[0].picture() is not None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process's own memory from that of files")
def test_memory_of_its_own_counts_and_mapped_files_do_not(tmp_path: Path) -> None:
    (tmp_path / "mapped").write_bytes(bytes(64 * MIB))
    holds = "import mmap,pathlib;f=open('mapped','rb');m=mmap.mmap(f.fileno(),0,prot=mmap.PROT_READ);sum(m[::4096]);"
    ends = "pathlib.Path('held').touch();import time;time.sleep(60)"
    own: dict[str, int] = {}
    for name, more in (("mapped", ""), ("both", "b=bytearray(48<<20);b[::4096]=b'x'*len(b[::4096]);")):
        (tmp_path / "held").unlink(missing_ok=True)
        seen = watch([sys.executable, "-c", holds + more + ends], tmp_path, os.environ, (tmp_path / "held").exists)
        own[name] = seen.own_bytes
    assert own["mapped"] < 48 * MIB <= own["both"] < 100 * MIB


def test_a_command_that_fails_is_told_with_its_words(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ended with 3:\nno luck"):
        watch([sys.executable, "-c", "print('no luck'); raise SystemExit(3)"], tmp_path, os.environ)


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        bench_data(200, tmp_path)


@pytest.mark.slow
def test_every_phase_is_measured_and_compared_with_its_goal(tmp_path: Path) -> None:
    result = bench_data(200, tmp_path / "data", against=Path(__file__).parents[2])
    assert {"check, unprepared", "prepare", "run to its first step", "restart in stage 8"} <= result["variants"].keys()
    assert all(row["found"] > 0 for name, row in result["goals"].items() if name != "memory beside the model")
    assert set(result["ratios"]["against"]) == {*result["goals"], "bytes_per_record"}


@pytest.mark.slow
def test_a_run_starts_on_indices_and_keys_alone(tmp_path: Path) -> None:
    result = bench_data(3_000, tmp_path / "data", index_only=True)
    assert result["records"] > 2_900 and result["key_width"] == 16
    assert result["variants"]["run to its first step"]["seconds"] > 1
