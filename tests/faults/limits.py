"""What the system allows a process: how many files it may have open."""

from __future__ import annotations

import resource
from typing import Any

from tests.faults.bench import Bench, Row

DESCRIPTORS, RECORDS = 256, 280


def few_descriptors(bench: Bench) -> Row:
    """A process may have fewer files open than a data set has shards, and may not raise the limit."""
    from tests import tiny_clip

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))

    tiny_clip.save_coin(bench.folder / "many", "T0", train=RECORDS, test=RECORDS)
    changes: dict[str, Any] = {
        "tasks": 1,
        "data__root": str(bench.folder / "many"),
        "data__prepared": str(bench.folder / "many-data"),
        "data__shard_samples": 1,
        "train__steps": RECORDS // 4,
        "train__save_steps": 50,
        "evaluate__zero_shot": False,
    }
    recipe, whole = bench.recipe("few-descriptors", **changes), bench.recipe("many-descriptors", **changes)
    prepared = bench.start(["prepare", str(recipe)], limited)
    code = prepared.wait()
    shards = len(list((bench.folder / "many-data").rglob("*.tar")))
    if code == 0:
        code, prepared = bench.run(recipe, limited)
    passed = code == 0 and shards == 2 * RECORDS and bench.run(whole)[0] == 0 and not bench.differences(recipe, whole)
    happens = f"nothing: {shards} shards are prepared, trained on and tested with {DESCRIPTORS} descriptors"
    return Row("descriptor limit", happens, "nothing", str(code), passed, prepared.said())
