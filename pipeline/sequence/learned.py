"""What the finished stages of a run have left: the pool of prompt sets, and the image projector where it is trained."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from pipeline.prompts.pool import PromptPool
from pipeline.prompts.stage_files import StageCheckpoint


@dataclass
class Learned:
    """Grows by one prompt set with every stage."""

    pool: PromptPool = field(default_factory=PromptPool)
    projector: dict[str, Tensor] = field(default_factory=dict)  # of the last stage; empty: the base model's

    def add(self, stage: str, checkpoint: StageCheckpoint) -> None:
        """Take up what the stage of this name has learned."""
        self.projector = checkpoint.projector
        self.pool.append(stage, checkpoint.prompt, checkpoint.prototype)
