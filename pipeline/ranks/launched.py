"""What the deepspeed launcher starts as each rank: `python -m pipeline.ranks.launched MODULE ARGUMENTS...`."""

from __future__ import annotations

import runpy
import sys

from pipeline.ranks.devices import restore_devices

if __name__ == "__main__":
    restore_devices()
    del sys.argv[0]  # the module finds its own name there, and its arguments
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
