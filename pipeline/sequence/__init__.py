"""Task sequences: training on one task after the other, and the evaluations in between.

`run_sequence` is the stable name. It is imported on first use, so that reading results does not import training code.
There is no __all__, because pdoc would take the name in it for a module.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "run_sequence":
        from pipeline.sequence.run import run_sequence  # torch and DeepSpeed, see above

        return run_sequence
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
