"""The section `train`: the optimisation of one stage."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.base import LoopConfig
from pipeline.config.given_paths import GivenPath

AUTO = "auto"  # value of train.deepspeed that `pipeline.planning.auto` resolves by the memory plan
ZERO2, ZERO3, HPZ = "ds_configs/zero2.json", "ds_configs/zero3.json", "ds_configs/zero3_multinode.json"


class TrainConfig(LoopConfig):
    """Optimisation of one stage."""

    deepspeed: GivenPath = Field(
        "auto",
        description="DeepSpeed file; batch, precision, clipping stay here; auto: ZeRO-2 where the run fits into its "
        "GPUs with it by the memory plan, else ZeRO-3 (on several nodes with a copy of the weights on each where that "
        "fits), which CPUs always get",
    )
    epochs: float = Field(10, gt=0, description="passes over a task's training samples")
    steps: int | None = Field(
        None,
        ge=1,
        description="optimizer steps per stage; overrides epochs, unless epochs are given later: by --set, or in a "
        "recipe that extends the one with steps",
    )
    budget: int | None = Field(
        None,
        ge=1,
        description="values of the method's module that a stage trains at most: its rank or prompt length is the "
        "largest within it, whatever the recipe says; null: as `method` says",
    )
    global_batch: int = Field(16, ge=1, description="samples per optimizer step, over all ranks")
    micro_batch: int | None = Field(None, ge=1, description="samples per rank and forward; null: no accumulation")
    lr_prompt: float = Field(gt=0, description="learning rate of a task's module, such as its prompt set")
    lr_head: float = Field(gt=0, description="learning rate of the projection head")
    projector: Literal["frozen", "trained"] = Field(
        "frozen", description="trained: the model's image projector learns too, so earlier tasks' answers may change"
    )
    vision_features: Literal["computed", "kept"] = Field(
        "computed",
        description="kept: the vision tower's features of each training image are computed once, before the stage, and "
        "then read from float16 files beside the prepared data; for models with the same number of tokens per image",
    )
    lr_projector: float = Field(2e-5, gt=0, description="learning rate of the projector when it is trained")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), description="AdamW's betas"
    )
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    schedule: Literal["constant", "cosine", "linear"] = Field("cosine", description="learning rate after the warm-up")
    warmup: float = Field(0.03, ge=0, lt=1, description="share of the steps with a rising learning rate")
    warmup_curve: Literal["linear", "log"] = Field(
        "linear", description="how it rises; log: as DeepSpeed's WarmupLR, which the official run gets"
    )
    clip: float | None = Field(1.0, gt=0, description="largest gradient norm; null: no clipping")
    checkpointing: Literal["auto", "none", "selective", "full"] = Field(
        "auto",
        description="activation checkpointing: layers of the decoder whose activations are recomputed instead of kept "
        "(none, every second one, all); saves memory, costs time, never changes the loss; auto: as few as fit into the "
        "GPUs by the memory plan, none without GPUs",
    )
    compile: Literal["none", "decoder", "decoder_and_tower"] = Field(
        "none",
        description="layers that run as code made by torch.compile in training: those of the decoder but the last one, "
        "and those of the vision tower; other last digits, minutes at the start; for methods whose modules stand at "
        "the input, with ZeRO-2 or without ZeRO",
    )
    packing: Literal["none", "samples"] = Field(
        "none",
        description="samples: short samples of a micro-batch stand behind each other in one row of the decoder's batch "
        "where they fit, all of them with flash_attention_2, in place of padding; for methods whose modules stand at "
        "the input",
    )
    length_buckets: bool = Field(
        False,
        description="batches of samples of similar length, separately for questions with and without an image: less "
        "padding, every sample still once per epoch; not together with questions_per_image",
    )
    questions_per_image: int = Field(
        4,
        ge=1,
        description="with method.insertion after_image: most questions about one image that follow each other in the "
        "order of samples, so that the image is computed once for them; 1: the order of the other insertions",
    )

    @model_validator(mode="after")
    def _micro_divides_global(self) -> TrainConfig:
        if self.micro_batch is not None and self.global_batch % self.micro_batch:
            raise ValueError(
                f"micro_batch {self.micro_batch} does not divide global_batch {self.global_batch}; "
                f"expected one of {', '.join(map(str, divisors(self.global_batch)))}"
            )
        return self


def divisors(number: int) -> list[int]:
    """Return the whole numbers that divide one, in rising order."""
    return [d for d in range(1, number + 1) if number % d == 0]
