"""A vLLM server that answers test questions: each request brings the vectors of the question's prompt sets."""

from __future__ import annotations

import asyncio
import base64
import functools
import io
import json
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from httpx2 import TransportError

from pipeline.adapter.vocabulary.part import PLACEHOLDER, identity_of_places
from pipeline.backbones.lmm_processor import load_processor
from pipeline.backbones.lmm_weights import DTYPES
from pipeline.config.models import ModelConfig
from pipeline.data.plain_text import PlainText
from pipeline.data.sample import Sample
from pipeline.data.selection import Selection, as_selection
from pipeline.errors import UserError
from pipeline.prompts.generation import Modules
from pipeline.prompts.insertion import gather_sets
from pipeline.prompts.parts.input_rows import PROMPT
from pipeline.sequence.test_set import TestSet
from pipeline.serve.front.engine import Behind, Engine, WrongCheckpointError
from pipeline.serve.front.form import PartsForm, encoded, with_vectors
from pipeline.serve.options import ENGINE_KEY_VARIABLE
from pipeline.serve.refusal import RefusedError

log = logging.getLogger(__name__)
PATIENCE_S = 600.0  # for a server that has answered before to come back; loading a large model takes minutes
RETRY_S = 2.0
AWAY = (429, 500, 502, 503, 504)  # statuses of a server that may answer later; 500 while its engine dies


class VllmServer:
    """The server at `url`, which has the checkpoint of `export --as parts`; used on rank 0.

    Args:
        url: its address.
        model: the run's settings of the frozen model.
        base_model: the frozen model's fingerprint.
        insertion: where prompt sets stand.
    """

    def __init__(self, url: str, model: ModelConfig, base_model: str, insertion: str) -> None:
        self.url, self.model = url.rstrip("/").removesuffix("/v1"), model
        self.dtype, self.identity = DTYPES[model.dtype], identity_of_places(base_model, model, insertion)
        self.known = False  # whether it has answered before
        self.patience_s = PATIENCE_S
        self._waits = False  # whether it is away at the moment

    def ailing(self) -> str:
        """Why the server does not answer, one sentence; "" where it does."""

        async def look() -> str:
            engine = self._engine(torch.zeros(0, 0, 0))
            async with engine.connected():
                return await engine.ailing()

        return asyncio.run(look())

    def answer(
        self,
        test: TestSet,
        indices: Sequence[int],
        modules: Modules,
        together: int,
        found: Callable[[int, str], None],
        progress: Callable[[], None],
    ) -> None:
        """Ask for greedy answers to these questions of a test set.

        Args:
            test: the test set.
            indices: the questions.
            modules: the prompt sets of all questions of the test set.
            together: most requests in progress.
            found: called with the number and the text of every answer.
            progress: called for every answer, and while the server is waited for.

        Raises UserError where the server is not reachable, has another checkpoint, or refuses a question.
        """

        async def all_of_them() -> None:
            prompts = modules.tensors.get(PROMPT, torch.zeros(0, 0, 0)).to(self.dtype)  # [T, L, D]
            selection = as_selection(modules.selected)
            engine, free = self._engine(prompts), asyncio.Semaphore(together)

            async def one(index: int) -> None:
                async with free:
                    what = f"question {test.data.ids[index]} of {test.name}"
                    sample = await asyncio.to_thread(test.data.__getitem__, index)
                    self._require_plain(sample.question, what)
                    fields = await asyncio.to_thread(_request, sample, test.max_new_tokens)
                    vectors = _vectors(prompts, selection, index)
                    engine.behind.form.identify(fields, with_vectors(fields, vectors) if vectors else {})
                    found(index, await self._text(engine, fields, what, progress))
                    progress()

            async with engine.connected():
                tasks = [asyncio.ensure_future(one(index)) for index in indices]
                try:
                    await asyncio.gather(*tasks)
                finally:  # where one has failed, the others end before the connections do
                    for task in tasks:
                        task.cancel()
                    await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run(all_of_them())

    async def _text(self, engine: Engine, fields: dict[str, Any], what: str, progress: Callable[[], None]) -> str:
        """The text of the answer to a request; waits for a server that is away for a while."""
        clock = asyncio.get_running_loop().time
        until = clock() + (self.patience_s if self.known else 0.0)
        while True:
            try:
                body = json.dumps({**fields, "model": await engine.model()}).encode()
                response = await engine.ask(body)
                try:
                    reply = json.loads(await response.aread())
                    text = str(reply["choices"][0]["message"]["content"] or "").strip()
                except (TransportError, ValueError, LookupError, TypeError) as error:
                    raise engine.lost(error) from None
                finally:
                    await response.aclose()
                self.known, self._waits = True, False
                return text
            except WrongCheckpointError as error:
                raise UserError(str(error)) from None
            except RefusedError as error:
                if error.status not in AWAY:
                    raise UserError(f"The server at {self.url} refuses {what}: {error}") from None
                if clock() >= until:
                    raise UserError(
                        f"{str(error).removesuffix('; ask again later.')}: expected the server of evaluate.vllm_url to "
                        "run. The answers so far are kept; the same command resumes."
                    ) from None
                if not self._waits:  # once for all requests
                    log.warning("waiting for the server: %s", error)
                self._waits = True
                await asyncio.sleep(RETRY_S)
                progress()

    @functools.cached_property
    def _plain(self) -> PlainText:
        """Knows the special tokens of the model, and the placeholder that the server's checkpoint adds."""
        processor = load_processor(self.model)
        return PlainText(processor.tokenizer, (processor.image_token, PLACEHOLDER))

    def _require_plain(self, question: str, what: str) -> None:
        """Raise UserError for a question with a special token as text, which a server reads as that token."""
        if self._plain.holds_special(question):
            raise UserError(
                f"{what[:1].upper()}{what[1:]} has a special token of the model in its text, which a server does not "
                "read as text: expected evaluate.engine replicas or sharded, or another question. The answers so far "
                "are kept; the same command resumes."
            )

    def _engine(self, prompts: torch.Tensor) -> Engine:
        """Connections to the server, which is verified with one of the sets, if there are any."""
        key = os.environ.get(ENGINE_KEY_VARIABLE, "").strip() or None
        names = ["any"] if len(prompts) else []
        return Engine(Behind(self.url, PartsForm(names, self.identity, prompts), key))


def _request(sample: Sample, longest: int) -> dict[str, Any]:
    """A chat request for the greedy answer to a sample, its image upright and in RGB as a run's own model has it."""
    content: list[dict[str, Any]] = [{"type": "text", "text": sample.question}]
    picture = sample.picture()
    if picture is not None:
        buffer = io.BytesIO()
        picture.save(buffer, "PNG", compress_level=1)
        address = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        content.insert(0, {"type": "image_url", "image_url": {"url": address}})
    messages = [{"role": "user", "content": content}]
    return {"messages": messages, "max_tokens": longest, "temperature": 0, "repetition_penalty": 1.0}


def _vectors(prompts: torch.Tensor, selection: Selection, index: int) -> str:
    """The encoded vectors of a question's sets, "" where it has none."""
    weights = None if selection.weights is None else selection.weights[index : index + 1]
    vectors, valid = gather_sets(prompts, selection.numbers[index : index + 1], weights)
    found = vectors[0, valid[0]]
    return encoded(found) if len(found) else ""
