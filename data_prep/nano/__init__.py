"""The embedded models and tasks: generated scenes, and a small LLaVA and a small CLIP trained on them from scratch."""

from pathlib import Path

CHECKPOINTS = Path(__file__).parent / "checkpoints"
