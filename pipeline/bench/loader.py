"""Reading samples: by index in training order against sequential reading of the same shards."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.bench import measure
from pipeline.bench.noise import write_noise
from pipeline.data.order import Order
from pipeline.data.sample import Sample
from pipeline.data.shards import IndexedShards
from pipeline.data.stream import stream


def bench_loader(folder: Path | None = None, samples: int = 2000, rounds: int = 5) -> dict[str, Any]:
    """Samples per second of the variants; `folder` is a prepared split, None: one of noise images is made.

    sequential: shard by shard through WebDataset, as image bytes and JSON. indexed: `IndexedShards` in the same order.
    permuted: in the order of a training epoch. No image is decoded. The first round warms up the page cache and is not
    counted.
    """
    with TemporaryDirectory() as temporary:
        split = folder or write_noise(Path(temporary), samples)
        shards = IndexedShards(split)
        tars = [str(split / shard["name"]) for shard in shards.description["shards"]]
        order = Order(len(shards), 64, seed=0, task=0).epoch(0).tolist()
        variants: dict[str, Callable[[], int]] = {
            "sequential": lambda: _bytes(stream(tars)),
            "indexed": lambda: _bytes(iter(shards)),
            "permuted": lambda: _bytes(shards[index] for index in order),
        }
        sizes = {name: call() for name, call in variants.items()}
        assert len(set(sizes.values())) == 1, f"the variants read different data: {sizes}"
        times: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(rounds):
            for name, call in variants.items():
                times[name].append(measure.seconds(call))
    count = len(order)
    rows = {
        name: {
            "samples_per_s": round(count / statistics.median(found)),
            "mib_per_s": round(sizes[name] / measure.MIB / statistics.median(found), 1),
        }
        for name, found in times.items()
    }
    ratios = {
        name: {
            "speed": round(statistics.median(a / b for a, b in zip(times["sequential"], times[name], strict=True)), 3)
        }
        for name in ("indexed", "permuted")
    }
    return {
        "samples": count,
        "rounds": rounds,
        "machine": measure.machine(),
        "variants": rows,
        "ratios": {"sequential": ratios},
    }


def _bytes(samples: Iterator[Sample]) -> int:
    """Read all samples; returns the bytes of their images, so that all variants can be seen to read the same."""
    return sum(len(sample.image or b"") for sample in samples)
