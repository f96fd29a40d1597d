"""A process keeps a few descriptors open, however many shards there are."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

from pipeline.data import shard_files as shard_files_module
from pipeline.data.shard_files import MOST_OPEN, ShardFiles

PROJECT = Path(__file__).resolve().parents[2]
SHARDS = 3 * MOST_OPEN

# Two splits read at random, then in forked workers, by a process that may open 100 files.
READS_ALL = """
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
from torch.utils.data import DataLoader
from pipeline.data.shards import IndexedShards
splits = [IndexedShards(Path(sys.argv[1]) / name) for name in ("train", "test")]
for shards in splits:
    assert [shards[row].id for row in range(len(shards))] == list(shards.ids)
    loader = DataLoader(shards, batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert [sample.id for sample in loader] == list(shards.ids)
print("read all")
"""


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def shard_files(folder: Path, count: int = SHARDS) -> ShardFiles:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{number}" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(b"%08d" % number)
    return ShardFiles(paths)


def test_a_low_limit_of_descriptors_does_not_end_a_process_that_reads_more_shards(tmp_path: Path) -> None:
    from data_prep.shards import write_shards
    from pipeline.data.sample import Sample

    samples = [Sample(f"s{n}", None, "what?", "this") for n in range(120)]
    for split in ("train", "test"):
        write_shards(lambda start: samples[start:], tmp_path / split, 1, "source", "Many", split)
    done = subprocess.run(
        [sys.executable, "-c", READS_ALL, str(tmp_path)], cwd=PROJECT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "read all\n", done.stderr[-2000:]


def test_all_splits_of_a_process_share_the_limit(tmp_path: Path) -> None:
    before = open_descriptors()
    splits = [shard_files(tmp_path / name) for name in ("a", "b")]
    for number in range(SHARDS):
        assert {split.read(number, 8, 0) for split in splits} == {b"%08d" % number}
    assert open_descriptors() <= before + MOST_OPEN
    del splits
    assert open_descriptors() <= before


def test_a_shard_that_a_thread_reads_from_is_not_closed_under_it(tmp_path: Path) -> None:
    files = shard_files(tmp_path)
    wrong: list[bytes] = []

    def read(start: int) -> None:
        for number in range(start, start + 4 * SHARDS):
            content = files.read(number % SHARDS, 8, 0)
            if content != b"%08d" % (number % SHARDS):
                wrong.append(content)

    threads = [threading.Thread(target=read, args=(start,)) for start in range(0, SHARDS, SHARDS // 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_garbage_collector_may_end_a_split_while_another_is_opened(tmp_path: Path, monkeypatch) -> None:
    gone = shard_files(tmp_path / "gone", MOST_OPEN)
    for number in range(MOST_OPEN):
        gone.read(number, 8, 0)
    gone.itself = gone  # type: ignore[attr-defined]  # a cycle, which only the collector ends
    del gone
    opens = shard_files_module._Descriptors._new

    def opened_and_collected(descriptors: object, path: Path) -> int:
        gc.collect()
        return opens(descriptors, path)  # type: ignore[arg-type]

    monkeypatch.setattr(shard_files_module._Descriptors, "_new", opened_and_collected)
    read: list[bytes] = []
    files = shard_files(tmp_path / "read", 1)
    reading = threading.Thread(target=lambda: read.append(files.read(0, 8, 0)), daemon=True)
    reading.start()
    reading.join(20)
    assert read == [b"00000000"]


def test_a_folder_that_was_written_anew_is_read_anew(tmp_path: Path) -> None:
    files = shard_files(tmp_path, 1)
    assert files.read(0, 8, 0) == b"00000000"
    (tmp_path / "new").write_bytes(b"another.")
    os.replace(tmp_path / "new", tmp_path / "0")
    again = ShardFiles(files.paths)
    assert again.read(0, 8, 0) == b"another."
