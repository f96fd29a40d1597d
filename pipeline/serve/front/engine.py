"""The engine behind: an OpenAI-compatible server with the exported checkpoint, reached over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx2
from httpx2 import AsyncClient, Response, Timeout, TransportError

from pipeline.serve.front.form import SetForm
from pipeline.serve.options import ENGINE_KEY_VARIABLE
from pipeline.serve.refusal import RefusedError

CONNECT_S = 5.0
LOOK_S = 10.0  # for replies that need no model: /health, /v1/models, /metrics
TRIAL_S = 120.0  # for one token, behind the questions that the engine answers already
SHOWN = 300  # characters of an engine's message
OTHER_SETS = "The prompt sets of this checkpoint are"  # in the error of an export's chat template


@dataclass(frozen=True)
class Behind:
    """Where the engine is, its key, and the form in which its checkpoint has to take prompt sets."""

    url: str
    form: SetForm
    key: str | None = None


class WrongCheckpointError(RefusedError):
    """The engine answers, but not with the exported checkpoint of these prompt sets."""

    def __init__(self, message: str) -> None:
        super().__init__(message, 503, "server_error")


class Engine:
    """Connections to an engine; used on one event loop, between `open` and `close`.

    Before the first request, and again after every failure, it is verified that the engine's checkpoint has the prompt
    sets: the chat template of an export raises an error when it is told another identity than its own.
    """

    def __init__(self, behind: Behind) -> None:
        self.behind = behind
        self._model: str | None = None  # what the engine calls its model; None: not verified
        self._verifying: asyncio.Task[str] | None = None  # shared by the requests that wait for it
        self._client: AsyncClient | None = None

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """Keep connections for the block."""
        headers = {} if self.behind.key is None else {"authorization": f"Bearer {self.behind.key}"}
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=64)
        # An answer takes as long as it takes; a proxy of the environment has nothing to do with an engine.
        timeout = Timeout(None, connect=CONNECT_S)
        async with AsyncClient(
            base_url=self.behind.url, headers=headers, limits=limits, timeout=timeout, trust_env=False
        ) as client:
            self._client, self._loop = client, asyncio.get_running_loop()
            try:
                yield
            finally:
                self._client = None
                if self._verifying is not None:
                    self._verifying.cancel()

    def abandon(self) -> None:
        """Close all connections, which ends unfinished answers with an error; may be called from any thread."""
        client = self._client
        if client is not None:
            with contextlib.suppress(RuntimeError):  # the loop may have been closed meanwhile
                asyncio.run_coroutine_threadsafe(client.aclose(), self._loop)

    async def model(self) -> str:
        """What the engine calls its model, once it is verified; raises RefusedError (503)."""
        if self._model is not None:
            return self._model
        if self._verifying is None:
            self._verifying = asyncio.ensure_future(self._verified())
            self._verifying.add_done_callback(self._keep)
        return await asyncio.shield(self._verifying)  # goes on for the others when a client leaves

    def _keep(self, verified: asyncio.Task[str]) -> None:
        self._verifying = None
        if not verified.cancelled() and verified.exception() is None:
            self._model = verified.result()

    async def ask(self, body: bytes) -> Response:
        """The reply to a chat request, of which the head has arrived; the caller closes it.

        Raises RefusedError: 503 where the engine is not reachable, else with the engine's own status and message.
        """
        response = await self._send("POST", "/v1/chat/completions", body, Timeout(None, connect=CONNECT_S))
        if response.status_code == 200:
            return response
        content = await self._content(response)
        await response.aclose()
        raise self._refusal(response.status_code, content)

    async def ailing(self) -> str:
        """Why the engine does not answer, one sentence; "" where it does."""
        try:
            response = await self._whole("GET", "/health", b"", LOOK_S)
            if response.status_code != 200:
                self._model = None
                return f"the engine at {self.behind.url} is not well (status {response.status_code})."
            await self.model()
        except RefusedError as error:
            return str(error)
        return ""

    async def metrics_text(self) -> str:
        """The engine's own page of metrics; "" where it has none or is not reachable."""
        try:
            response = await self._whole("GET", "/metrics", b"", LOOK_S)
        except RefusedError:
            return ""
        return response.text if response.status_code == 200 else ""

    def lost(self, error: Exception) -> RefusedError:
        """The refusal for a connection that failed; the engine is verified anew before it is asked again."""
        self._model = None
        why = str(error) or type(error).__name__
        return RefusedError(
            f"the engine at {self.behind.url} is not reachable ({why[:SHOWN]}); ask again later.", 503, "server_error"
        )

    async def _verified(self) -> str:
        """The name of the engine's model; raises RefusedError unless it is an export of the prompt sets."""
        response = await self._whole("GET", "/v1/models", b"", LOOK_S)
        if response.status_code != 200:
            raise self._refusal(response.status_code, response.content)
        try:
            model = str(response.json()["data"][0]["id"])
        except (ValueError, LookupError, TypeError):
            raise WrongCheckpointError(f"the engine at {self.behind.url} names no model at /v1/models.") from None
        expected = f"expected {self.behind.form.expected}"
        wrong = await self._trial(model, "another")
        if wrong.status_code == 200:
            found = f"the engine at {self.behind.url} serves a model without prompt sets"
            raise WrongCheckpointError(f"{found}; {expected}.")
        right = await self._trial(model, None)
        if right.status_code == 400:
            said = _message(right.content)
            if OTHER_SETS in said:
                raise WrongCheckpointError(
                    f"the engine at {self.behind.url} has other prompt sets ({said}); {expected}."
                )
            raise WrongCheckpointError(f"the engine at {self.behind.url} refuses prompt sets ({said}); {expected}.")
        if right.status_code == 404:
            said = _message(right.content)
            raise WrongCheckpointError(f"the engine at {self.behind.url} lacks what was learned ({said}); {expected}.")
        if right.status_code != 200:
            raise self._refusal(right.status_code, right.content)
        return model

    async def _trial(self, model: str, identity: str | None) -> Response:
        """The reply to a request for one token with one set, the checkpoint having an identity; None: the right one."""
        form = self.behind.form
        body: dict[str, Any] = {
            "model": model,
            "messages": [{"role": "user", "content": "?"}],
            "max_tokens": 1,
            "temperature": 0,
        }
        form.write(body, form.names[-1:], identity)
        return await self._whole("POST", "/v1/chat/completions", json.dumps(body).encode(), TRIAL_S)

    async def _whole(self, method: str, path: str, body: bytes, seconds: float) -> Response:
        response = await self._send(method, path, body, Timeout(seconds, connect=CONNECT_S))
        await self._content(response)
        await response.aclose()
        return response

    async def _send(self, method: str, path: str, body: bytes, timeout: Timeout) -> Response:
        if self._client is None:
            raise RefusedError("the server is stopping; ask again later.", 503, "server_error")
        headers = {"content-type": "application/json"} if body else {}
        request = self._client.build_request(method, path, content=body, headers=headers, timeout=timeout)
        try:
            return await self._client.send(request, stream=True)
        except TransportError as error:
            raise self.lost(error) from None

    async def _content(self, response: Response) -> bytes:
        try:
            return await response.aread()
        except TransportError as error:
            raise self.lost(error) from None

    def _refusal(self, status: int, content: bytes) -> RefusedError:
        """The refusal for an engine's error reply."""
        said = _message(content)
        if status >= 500 or status in (401, 403, 404) or OTHER_SETS in said:
            self._model = None  # it may be another engine by now
        if OTHER_SETS in said:
            return WrongCheckpointError(f"the engine at {self.behind.url} has other prompt sets ({said}).")
        if status in (401, 403):
            return RefusedError(
                f"the engine at {self.behind.url} does not take this service's key; expected {ENGINE_KEY_VARIABLE} to "
                "be the key that it was started with.",
                503,
                "server_error",
            )
        if status == 404:
            return RefusedError(f"the engine has changed ({said}); ask again.", 503, "server_error")
        kind = "server_error" if status >= 500 else "invalid_request_error"
        return RefusedError(said, status, "rate_limit_exceeded" if status == 429 else kind)


def _message(content: bytes) -> str:
    """The message in an error's body, which servers write as OpenAI does or nearly so."""
    try:
        value: Any = json.loads(content)
    except ValueError:
        value = content.decode("utf-8", "replace")
    if isinstance(value, dict):
        value = value.get("error", value)
    if isinstance(value, dict):
        value = value.get("message") or value.get("detail") or value
    return " ".join(str(value).split())[:SHOWN] or "no message"
