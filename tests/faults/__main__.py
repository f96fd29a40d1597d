"""Break runs in every way of the table and print what happened; `--fast` takes what is over in a minute or two."""

from __future__ import annotations

import argparse
import os
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

# Before torch or deepspeed is imported anywhere.
os.environ.update({"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})
os.environ.update({"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"})
os.environ.update({"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"})

from tests.faults import damage, hanging, kills, limits, models, sharing, surroundings
from tests.faults.bench import Bench, Row, bench

FAST = ("kills", "signals", "asleep", "diverges", "full-disk")
FAST_LIMIT_S = 10.0  # of the watchdog, with --fast
FAST_DISK = ("prediction file",)
MESSAGE_CHARS = 240  # of a message in the table
VERDICTS = {True: "ok    ", False: "FAILED", None: "-     "}


def rows(kill: int, kill_ranks: int, fast: bool = False) -> dict[str, Callable[[Bench], Any]]:
    """The faults by name; each gives a row or several."""
    limit_s, disks = (FAST_LIMIT_S, FAST_DISK) if fast else (hanging.LIMIT_S, tuple(surroundings.FULL))
    return {
        "kills": partial(kills.killed_runs, kills=kill),
        "kill-a-rank": partial(kills.killed_ranks, kills=kill_ranks),
        "signals": kills.stopped_rank,
        "asleep": partial(hanging.sleeping_rank, limit_s=limit_s),
        "diverges": partial(hanging.diverging_rank, limit_s=limit_s),
        "stopped": hanging.stopped_process,
        "nan": surroundings.not_a_number,
        "checkpoints": damage.damaged_checkpoints,
        "stages": damage.damaged_stages,
        "results": damage.damaged_results,
        "data": damage.damaged_data,
        "changed-data": damage.changed_data,
        "bomb": damage.image_bomb,
        "shared-data": sharing.one_prepared_folder,
        "hub": models.silent_hub,
        "weights": models.changed_weights,
        "full-disk": partial(surroundings.full_disk, kinds=disks),
        "full-disk-shards": surroundings.full_disk_for_shards,
        "full-disk-mlflow": surroundings.full_disk_for_mlflow,
        "read-only": surroundings.read_only,
        "descriptors": limits.few_descriptors,
        "clock": surroundings.jumping_clock,
        "mlflow": surroundings.vanishing_mlflow,
    }


def tried(name: str, work: Callable[[Bench], Any], bench: Bench) -> Iterator[Row]:
    """The rows of one fault; what cannot be tried here is said so, and what breaks the trial fails."""
    try:
        found = work(bench)
        yield from [found] if isinstance(found, Row) else found
    except PermissionError as error:
        yield Row(name, f"not tried: {error}", "-", "-", None)
    except Exception as error:
        yield Row(name, f"the trial broke: {type(error).__name__}: {error}", "?", "?", False)


def markdown(found: list[Row]) -> str:
    """The table of docs/reliability.md."""
    lines = ["| fault | what happens | lost | exit code | message |", "|---|---|---|---|---|"]
    for row in found:
        said = re.sub(r"[^\s']*/faults-[^/]*/bench/", "", row.message).replace("|", "/")
        said = textwrap.shorten(said, MESSAGE_CHARS, placeholder=" ...")
        cells = [row.fault, row.happens + (" **FAILED**" if row.passed is False else ""), row.lost, row.code, said]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Try the faults; 0 when every one that could be tried behaved as documented."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=rows(0, 0), help="only these faults")
    parser.add_argument("--fast", action="store_true", help="few kills, and only what is quick")
    parser.add_argument("--kills", type=int, help="kills of a single rank (30; 3 with --fast)")
    parser.add_argument("--kill-ranks", type=int, default=3, help="kills of one of two ranks")
    parser.add_argument("--markdown", type=Path, help="write the table there")
    options = parser.parse_args()
    chosen = options.only or (FAST if options.fast else list(rows(0, 0)))
    found: list[Row] = []
    with bench() as ground:
        kills = options.kills or (3 if options.fast else 30)
        for name, work in rows(kills, options.kill_ranks, options.fast).items():
            if name not in chosen:
                continue
            began = time.monotonic()
            for row in tried(name, work, ground):
                found.append(row)
                verdict = VERDICTS[row.passed]
                print(
                    f"{verdict} {row.fault}: {row.happens}; lost: {row.lost}; code {row.code}; {row.message}",
                    flush=True,
                )
            print(f"       ({name}: {time.monotonic() - began:.0f} s)", flush=True)
    if options.markdown:
        options.markdown.write_text(markdown(found), "utf-8")
    as_documented = sum(row.passed is True for row in found)
    not_tried = [row.fault for row in found if row.passed is None]
    missed = f"; not tried here: {', '.join(not_tried)}" if not_tried else ""
    print(f"{as_documented} of {len(found)} faults behave as documented{missed}", flush=True)
    return 1 if any(row.passed is False for row in found) else 0


if __name__ == "__main__":
    sys.exit(main())
