"""The projection head: it maps a prompt set into the space of the CLIP keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from pipeline.prompts.parts.base import Part, shape_of
from pipeline.prompts.routers.mean import PROTOTYPE

if TYPE_CHECKING:
    from pipeline.backbones.lmm import LMM


class ProjectionHead(Part):
    """Two linear layers with a SiLU between them, D -> D -> K (docs/design.md 4.1, f_i).

    What ModalPrompt's router learns: a stage's prototype is what its head makes of its prompt set.
    """

    prefix = "head."
    rate: ClassVar[str] = "lr_head"

    def __init__(self, width: int, key_width: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, width, dtype=dtype)
        self.fc2 = nn.Linear(width, key_width, dtype=dtype)

    def forward(self, prompt: Tensor) -> Tensor:
        """The prototype [K] of a prompt set [L, D]: the mean over L of the projected vectors (docs/design.md 4.4)."""
        return self.fc2(nn.functional.silu(self.fc1(prompt))).mean(dim=-2)

    def start(self, lmm: LMM, generator: torch.Generator, previous: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As `torch.nn.Linear` starts."""
        bound = lmm.width**-0.5  # both layers read vectors of the model's width
        return {
            name: (torch.rand(shape_of(parameter), generator=generator) * 2 - 1) * bound
            for name, parameter in self.trainables().items()
        }

    def finish(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The prototype [K] of a stage's final values, in float32 (docs/design.md 4.4)."""
        return {PROTOTYPE: prototype_of(values)}


@torch.no_grad()
def prototype_of(values: Mapping[str, Tensor]) -> Tensor:
    """The prototype [K] of a stage's final values `prompt` and `head.*`, in float32."""
    fc1, fc2 = values["head.fc1.weight"], values["head.fc2.weight"]
    head = ProjectionHead(fc1.shape[1], fc2.shape[0])
    head.load_state_dict({name.removeprefix("head."): value for name, value in values.items() if name[:5] == "head."})
    prototype: Tensor = head(values["prompt"])
    return prototype
