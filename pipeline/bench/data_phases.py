"""Two phases of `pipeline.bench data` that need more than a verb: a script, run with the measured code on the path.

Its last line of output is the measurement as JSON.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

STAGES_BEFORE = 7  # finished ones, before the stage that a restart finds


def prepare(recipe_path: str) -> dict[str, Any]:
    """`prepare` with generated keys in place of CLIP's; the time for writing them is reported separately."""
    import numpy as np

    import data_prep.prepare as verb  # deferred: a phase is measured with its own imports
    from pipeline.config.load import load_recipe  # deferred: a phase is measured with its own imports
    from pipeline.data import shards as prepared  # deferred: a phase is measured with its own imports

    source, spent = _beside("data_source"), [0.0, 0.0]

    def generated(folder: Path, identity: dict[str, str], *_: Any, **__: Any) -> bool:
        began = time.perf_counter(), time.process_time()
        shards = prepared.IndexedShards(folder)
        try:
            shards.keys(identity)
            return False
        except Exception:  # missing or damaged keys are written anew
            pass
        index = prepared.read_index(folder, shards.description)
        has_image = ~index["image_size"].is_null().to_numpy()
        width = json.loads((Path(recipe_path).parent / "generated.json").read_text("utf-8"))["key_width"]
        source.write_keys_of(folder, identity, width, np.asarray(has_image))
        _write_table(folder / prepared.KEYS_TABLE, shards, prepared.FINGERPRINT)
        for place, clock in enumerate((time.perf_counter, time.process_time)):
            spent[place] += clock() - began[place]
        return True

    verb.write_keys = generated
    began = time.perf_counter(), time.process_time()
    result = verb.prepare(load_recipe(recipe_path), progress=False)
    seconds, processor = time.perf_counter() - began[0], time.process_time() - began[1]
    count = sum(split["samples"] for split in result["splits"])
    return {"records": count, "seconds": seconds - spent[0], "processor_s": processor - spent[1]}


def _beside(name: str) -> Any:
    """Import a module beside this file by path: the measured version of the code may lack it."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _write_table(path: Path, shards: Any, fingerprint: Any) -> None:
    """The table of the keys, as far as it is checked: the ids."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"id": pa.array(list(shards.ids))}).replace_schema_metadata({fingerprint: shards.fingerprint})
    pq.write_table(table, path)


def fill(recipe_path: str) -> dict[str, Any]:
    """A run whose first stages are finished and evaluated; all answers are the same text, without generation."""
    import pipeline.sequence.evaluate  # deferred: a phase is measured with its own imports
    from pipeline.config.load import load_recipe  # deferred: a phase is measured with its own imports
    from pipeline.sequence.run import run_sequence  # deferred: a phase is measured with its own imports

    def answers(*arguments: Any, **named: Any) -> dict[int, str]:
        indices = named["indices"] if "indices" in named else arguments[2]
        return dict.fromkeys(indices, "thing 1")

    pipeline.sequence.evaluate.generate_answers = answers
    run_sequence(load_recipe(recipe_path), until=STAGES_BEFORE)
    return {}


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose modules could shadow others of the same name
    print(json.dumps({"prepare": prepare, "fill": fill}[sys.argv[1]](sys.argv[2])))
