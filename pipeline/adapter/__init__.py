"""Adapters: what was learned as one portable folder, and what answering with it needs.

`load_adapter` and `export` are the stable names: model cards and notebooks outside the repository import them from
here.
"""

from pipeline.adapter.load import export, load_adapter

__all__ = ["export", "load_adapter"]
