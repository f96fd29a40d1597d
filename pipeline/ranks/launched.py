"""Entry point of each rank under DeepSpeed's launcher: `python -m pipeline.ranks.launched MODULE ARGUMENTS...`."""

from __future__ import annotations

import runpy
import sys

from pipeline.ranks.devices import restore_devices

if __name__ == "__main__":
    restore_devices()
    del sys.argv[0]  # now MODULE and its arguments, as `python -m MODULE` has them
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
