"""A Hub that does not answer, weights that are missing or another model's: a sentence in seconds, no wrong run."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.faults.bench import Bench, Row, Sabotage
from tests.faults.damage import flipped
from tests.hub_stub import FAULTS, REPOSITORY

WORDS = {"hangs": "takes connections and says nothing", "closes": "closes every connection"}
LIMIT_S = 60.0


def silent_hub(bench: Bench) -> Iterator[Row]:
    """With nothing here it is said so, with the model in the cache it is used."""
    full = bench.folder / "full-cache"
    recipe = bench.recipe("hub", model__path=REPOSITORY)
    with served(bench.folder / "llava", "") as address:
        code, process = bench.run(recipe, asking(address, full))
    passed = code == 0 and not bench.differences(recipe)
    yield Row("a Hub that answers", "fetched once; equal to the run on the folder", "nothing", str(code), passed)
    for fault in FAULTS:
        with served(bench.folder / "llava", fault) as address:
            began = time.monotonic()
            first = bench.recipe(f"hub-{fault}-empty", model__path=REPOSITORY)
            code, process = bench.run(first, asking(address, bench.folder / f"empty-cache-{fault}"))
            took = time.monotonic() - began
            second = bench.recipe(f"hub-{fault}", model__path=REPOSITORY)
            cached, _ = bench.run(second, asking(address, full))
        passed = (code, cached) == (2, 0) and took < LIMIT_S and not bench.differences(second)
        happens = "said so within seconds; with the model in the cache the run is equal"
        happens += "" if passed else f" (exit codes {(code, cached)}, {took:.0f} s)"
        said = process.said()
        yield Row(f"a Hub that {WORDS.get(fault, f'answers {fault}')}", happens, "nothing", f"{code}, 0", passed, said)


def changed_weights(bench: Bench) -> Iterator[Row]:
    """Weights of the model, taken away or changed between two starts."""
    folder = bench.folder / "changing-llava"
    weights = Path(shutil.copytree(bench.folder / "llava", folder)) / "model.safetensors"
    content = weights.read_bytes()

    recipe = bench.recipe("weights-missing", model__path=str(folder))
    weights.unlink()
    code, process = bench.run(recipe)
    weights.write_bytes(content)
    again, _ = bench.run(recipe)
    passed = (code, again) == (2, 0) and not bench.differences(recipe)
    yield Row("weights missing", "named; equal once they are there", "nothing", str(code), passed, process.said())

    recipe = bench.recipe("weights-changed", model__path=str(folder))
    begun = bench.start(["run", str(recipe), "--until", "1"]).wait()
    flipped(weights)
    code, process = bench.run(recipe)
    weights.write_bytes(content)
    again, _ = bench.run(recipe)
    passed = (begun, code, again) == (0, 2, 0) and not bench.differences(recipe)
    happens = "the run does not go on with them; equal once they are put back"
    fault = "weights changed in the middle of a file, between two starts"
    yield Row(fault, happens, "nothing", str(code), passed, process.said())


@contextlib.contextmanager
def served(folder: Path, fault: str) -> Iterator[str]:
    """The address of a Hub in a process of its own: this one forks, and must have no threads."""
    command = [sys.executable, "-m", "tests.hub_stub", str(folder), fault]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def asking(address: str, cache: Path) -> Sabotage:
    """As in a process that was started with HF_ENDPOINT and HF_HOME, and may use the network."""

    def sabotage() -> None:
        from huggingface_hub import constants

        constants.HF_HUB_OFFLINE = False
        constants.ENDPOINT = address
        constants.HUGGINGFACE_CO_URL_TEMPLATE = address + "/{repo_id}/resolve/{revision}/{filename}"
        constants.HF_HOME, constants.HF_HUB_CACHE = str(cache), str(cache / "hub")

    return sabotage
