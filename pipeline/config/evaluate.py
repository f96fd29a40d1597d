"""The section `evaluate`: the generation of the answers that are scored."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipeline.config.base import Section


class EvaluateConfig(Section):
    """Generation of the answers that are scored."""

    batch: int = Field(50, ge=1, description="samples per generate call and replica")
    engine: Literal["replicas", "sharded", "vllm"] = Field(
        "replicas",
        description="replicas: each rank has the whole model and answers questions of its own; sharded: several ranks "
        "have the layers of one model and answer the same questions, for models that do not fit one GPU; vllm: a vLLM "
        "server at vllm_url answers, which gets the prompt sets as vectors",
    )
    vllm_url: str | None = Field(
        None,
        description="with engine vllm, the address of a server of what export writes with --as parts, started with "
        "--enable-prompt-embeds, such as http://127.0.0.1:8001; its key is read from PIPELINE_ENGINE_KEY",
    )
    shards: Annotated[int, Field(ge=2)] | Literal["auto"] = Field(
        "auto",
        description="with engine sharded, the ranks that have one model together; auto: those of a node, or all ranks "
        "where there are fewer",
    )
    static_cache: bool = Field(
        False,
        description="true: each batch of answers has a cache of fixed size, and GPUs replay a token's step as one CUDA "
        "graph; for methods whose modules stand at the input, with engine replicas",
    )
    zero_shot: bool = Field(True, description="score the frozen model alone before the first stage")
    ahead: bool = Field(
        False, description="also score each task just before its own stage, for forward transfer; costs a test set each"
    )
    told: Literal["last", "stages", "never"] = Field(
        "last",
        description="score each task also with every sample's own set ranked first, after the last stage of a call or "
        "after all stages; answers anew only what routing sent to another set",
    )
    held_out: bool = Field(
        False,
        description="after the last stage, also answer its held-out samples with its own set ranked first, and compare "
        "with the most frequent training answer: whether the task was learned, as `add` says",
    )
    repetition_penalty: Annotated[float, Field(gt=0)] | Literal["checkpoint"] = Field(
        1.0,
        description="penalty for tokens that the answer has already; 1: none, so that boxes and numbers can repeat "
        "digits; checkpoint: the value in the model's generation_config.json",
    )
    reuse: bool = Field(True, description="keep an answer when a later stage selects the same sets")
    share_images: bool = Field(
        False,
        description="encode an image once for all questions about it that get the same sets; always on with "
        "method.insertion after_image",
    )

    def tells(self, last: bool) -> bool:
        """Whether scores with the task told are measured after a stage, the `last` one of a call or not."""
        return self.told == "stages" or (self.told == "last" and last)
