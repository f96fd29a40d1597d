"""`evaluate.engine: vllm`: which recipes a vLLM server can answer for, and the server of a run."""

from __future__ import annotations

import importlib.util
import re
from typing import TYPE_CHECKING

from pipeline.config.method import choice_name
from pipeline.config.recipe import Recipe
from pipeline.errors import UserError, require_extras
from pipeline.methods import make_method
from pipeline.prompts.parts.base import entry_of
from pipeline.prompts.parts.input_rows import RowsEntry

if TYPE_CHECKING or importlib.util.find_spec("httpx2") is not None:  # of the extra `serve`, which others do without
    from pipeline.sequence.vllm_server import VllmServer

URL = re.compile(r"https?://[^/\s?#]+(/[^\s?#]*)?")


def require_answerable(recipe: Recipe) -> None:
    """Raise UserError where `evaluate.engine` is vllm and a server cannot give the answers that a replica would."""
    evaluate, method = recipe.evaluate, make_method(recipe.method)
    if evaluate.engine != "vllm":
        if evaluate.vllm_url is not None:
            raise UserError(
                f"evaluate.vllm_url means nothing with evaluate.engine {evaluate.engine}; leave it out, or set the "
                "engine to vllm."
            )
        return
    if evaluate.vllm_url is None or not URL.fullmatch(evaluate.vllm_url):
        found = "not set" if evaluate.vllm_url is None else f"'{evaluate.vllm_url}'"
        raise UserError(
            f"evaluate.vllm_url is {found}; expected the address of a vLLM server, such as http://127.0.0.1:8001, "
            "which runs with the checkpoint of `python -m pipeline export RECIPE DIR --as parts` and "
            "--enable-prompt-embeds."
        )
    obstacles: list[tuple[bool, str]] = [
        (
            type(entry_of(method)) is not RowsEntry,
            f"gets vectors among the words of a question, and the method {method.name} learns modules of the part "
            f"{'none' if method.part is None else choice_name(method.part)}; expected prompt sets, the part input_rows",
        ),
        (recipe.train.projector == "trained", "has the frozen projector; expected train.projector frozen"),
        (
            recipe.model.quantization != "none",
            f"has unquantised weights; expected model.quantization none, not {recipe.model.quantization}",
        ),
        (
            evaluate.repetition_penalty != 1,
            "counts the tokens of the question in a repetition penalty too; expected evaluate.repetition_penalty 1",
        ),
        (
            recipe.method.keeps_answer_heads,
            "decodes without answer heads; expected method.answer_head none",
        ),
        (recipe.data.cuts, "cuts no questions; expected data.too_long refuse or skip"),
    ]
    for is_met, sentence in obstacles:
        if is_met:
            raise UserError(f"evaluate.engine vllm: the server {sentence}, or evaluate.engine replicas or sharded.")
    require_extras("serve")


def server_of(recipe: Recipe, base_model: str) -> VllmServer | None:
    """The server that answers for a run; None where its ranks do. `base_model` is the frozen model's fingerprint."""
    if recipe.evaluate.engine != "vllm":
        return None
    require_extras("serve")
    insertion = entry_of(make_method(recipe.method)).insertion or "after_bos"
    return VllmServer(str(recipe.evaluate.vllm_url), recipe.model, base_model, insertion)
