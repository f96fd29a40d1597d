"""What answering and looking load: neither DeepSpeed nor MLflow; and the benchmark that times their start."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.bench.startup import QUESTION, STARTS, bench_startup, write_random_adapter
from pipeline.errors import UserError
from tests import tiny
from tests.processes import PROJECT

# Libraries that neither answering nor looking at runs needs; some take seconds to import.
UNNEEDED = ("deepspeed", "mlflow", "webdataset", "pyarrow", "pandas", "sklearn", "matplotlib", "starlette", "datasets")
# In the order of a first visit; a verb that needs no torch comes before those that do.
PROGRAM = """
import json, sys
from pipeline.cli.commands import app
def loaded(): return [name for name in ("torch", *json.loads(sys.argv[1])) if name in sys.modules]
app(["--help"], standalone_mode=False)
import pipeline.adapter
assert "pydantic" not in sys.modules
app(["ls"], standalone_mode=False)
assert not loaded(), loaded()
asked = sys.argv[2]
answer = pipeline.adapter.load_adapter("adapter").ask(asked, "picture.png")
app(["predict", "adapter", "--image", "picture.png", "--question", asked, "--json"], standalone_mode=False)
print(json.dumps({"ask": answer.text, "loaded": loaded()}))
"""


def test_answers_and_lists_need_neither_deepspeed_nor_mlflow(tmp_path: Path) -> None:
    write_random_adapter(tmp_path / "adapter")
    (tmp_path / "picture.png").write_bytes(tiny.png((250, 10, 10)))
    (tmp_path / "runs").mkdir()
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path.insert(0, {str(PROJECT)!r})\n{PROGRAM}",
            json.dumps(UNNEEDED),
            QUESTION,
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    predicted, last = map(json.loads, done.stdout.splitlines()[-2:])
    assert last["loaded"] == ["torch"]
    assert predicted["answer"] == last["ask"] and predicted["selected"]


def test_the_benchmark_times_processes_and_shows_why_one_fails() -> None:
    found = bench_startup(1, {"a verb": STARTS["ls"]})["variants"]["a verb"]
    assert found["processor_s"] > 0 and found["seconds"] > 0
    with pytest.raises(UserError, match=r"python -c 1/0` failed: ZeroDivisionError: division by zero;"):
        bench_startup(1, {"fault": ("-c", "1/0")})
