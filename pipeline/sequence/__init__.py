"""Task sequences: training on one task after the other, and the evaluations in between.

`run_sequence` is the stable name. It is imported on first use, so that reading a result loads no training code. There
is no __all__, in which pdoc would look for a module of this name.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "run_sequence":
        from pipeline.sequence.run import run_sequence  # torch and DeepSpeed, see above

        return run_sequence
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
