"""How long MLflow takes to list a store of many runs, against one of few: what its page of runs asks for."""

from __future__ import annotations

import sqlite3
import statistics
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.bench import measure
from pipeline.config.load import load_recipe
from pipeline.tracking.open import make_tracker, sequence_facts
from pipeline.tracking.store import open_store

RECIPE = "nano"  # its tasks, settings and number of logged steps
STEPS, EVERY = 150, 25
PAGE = 100  # runs that MLflow's page asks for at once
FEW = 1  # sequences of the small store
SCORES = ("last", "average", "forgetting", "backward_transfer", "told", "routing.accuracy", "gain", "zero_shot")


def bench_tracking(runs: int = 2000, rounds: int = 3) -> dict[str, Any]:
    """Measure queries on a store of at least `runs` runs, parents and stages together, and on one of one sequence.

    The first sequence is written by the tracker of a run; the others are copies of its rows, with identities and scores
    of their own, because it takes minutes to write thousands through MLflow. Seconds are medians; the two stores take
    turns.
    """
    with TemporaryDirectory() as name:
        stores = {}
        per_sequence = 1 + len(load_recipe(RECIPE).data.tasks)
        for size, sequences in (("few", FEW), ("many", -(-runs // per_sequence))):
            path = Path(name) / f"{size}.db"
            write_sequence(path)
            copy_sequences(path, sequences)
            stores[size] = open_store(f"sqlite:///{path}", RECIPE)
            measure.tell(f"{size}: {sequences * per_sequence} runs, {path.stat().st_size / 1e6:.1f} MB")
        spent: dict[str, dict[str, list[tuple[float, float]]]] = {size: {} for size in stores}
        found: dict[str, int] = {}
        for _ in range(rounds + 1):  # the first one fills caches
            for size, (client, experiment) in stores.items():
                for title, query in queries(client, experiment).items():
                    begun, used = time.perf_counter(), time.process_time()
                    count = query()
                    now = (time.perf_counter() - begun, time.process_time() - used)
                    spent[size].setdefault(title, []).append(now)
                    found |= {title: count} if size == "many" else {}
    variants = {}
    for title, count in found.items():
        seconds, processor = (_median(spent["many"][title], place) for place in (0, 1))
        few = _median(spent["few"][title], 1)
        variants[title] = {
            "runs": count,
            "seconds": round(seconds, 2),
            "processor_s": round(processor, 2),
            "processor_s_of_few": round(few, 3),
            "ratio": round(processor / few, 1),
        }
    return {"machine": measure.machine("cpu"), "rounds": rounds, "variants": variants}


def _median(spent: Sequence[tuple[float, float]], place: int) -> float:
    """The median over the rounds after the first, of wall (0) or processor time (1)."""
    return statistics.median(times[place] for times in spent[1:])


def queries(client: Any, experiment: str) -> Mapping[str, Callable[[], int]]:
    """The queries by name; each returns the number of runs that it got."""

    def page(order: str, only: str = "") -> Callable[[], int]:
        return lambda: len(client.search_runs([experiment], only, max_results=PAGE, order_by=[order]))

    def every() -> int:
        count, token = 0, None
        while True:
            found = client.search_runs([experiment], max_results=1000, page_token=token)
            count, token = count + len(found), found.token
            if not token:
                return count

    return {
        "first page, newest first": page("attributes.start_time DESC"),
        "first page, by last": page("metrics.last DESC"),
        "sequences alone, by last": page("metrics.last DESC", "tags.kind = 'sequence'"),
        "last above 50, by last": page("metrics.last DESC", "metrics.last > 50"),
        "all runs": every,
    }


def write_sequence(database: Path) -> None:
    """Track one sequence as a run of the recipe does: parameters, scores after each stage, losses of each stage."""
    recipe = load_recipe(RECIPE, [f"tracking.uri=sqlite:///{database}", "tracking.experiment=" + RECIPE])
    tracker = make_tracker(sequence_facts(recipe), database.parent / "run", rank=0)
    names = [task.name for task in recipe.data.tasks]
    with tracker.sequence({}):
        for number, name in enumerate(names):
            with tracker.stage(number, name):
                for step in range(EVERY, STEPS + 1, EVERY):
                    numbers = ("loss", "loss_lm", "lr", "samples_per_s", "answer_tokens_per_s", "memory_gib")
                    tracker.metrics({key: 1.0 / step for key in numbers}, step)
            scores = {f"accuracy.{seen}": 70.0 for seen in names[: number + 1]}
            tracker.metrics({**scores, **dict.fromkeys(SCORES, 70.0)}, number + 1)


def copy_sequences(database: Path, sequences: int) -> None:
    """Copy the store's one sequence until there are so many, with run ids, parents and scores `last` of their own."""
    with sqlite3.connect(database) as store:
        tables = [name for (name,) in store.execute("select name from sqlite_master where type = 'table'")]
        columns = {table: [row[1] for row in store.execute(f"pragma table_info({table})")] for table in tables}
        own = {table: names for table, names in columns.items() if "run_uuid" in names}
        ids = [run for (run,) in store.execute("select run_uuid from runs")]
        for number in range(1, sequences):
            fresh = {run: uuid.uuid4().hex for run in ids}
            for table, names in own.items():
                listed, marks = ", ".join(names), ", ".join("?" * len(names))
                for run in ids:
                    rows = store.execute(f"select {listed} from {table} where run_uuid = ?", (run,)).fetchall()
                    new = [[fresh.get(value, value) for value in row] for row in rows]
                    store.executemany(f"insert into {table} ({listed}) values ({marks})", new)
            for table in ("metrics", "latest_metrics"):
                store.execute(
                    f"update {table} set value = ? where key = 'last' and run_uuid in ({', '.join('?' * len(ids))})",
                    (number * 37 % 1000 / 10, *fresh.values()),
                )
    store.close()
