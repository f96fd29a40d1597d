"""Continual prompt learning on frozen vision-language models."""

import os

__version__ = "0.1.0"

# Here, because libgomp reads it when torch is loaded. By default the threads of an operation wait for each other by
# asking again and again; where anything else runs on the machine they take the processor from those they wait for, and
# a step takes ten times as long. How many threads there are, and so what they compute, stays as it is.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
