"""Tokens per second of the service by its number of clients, against an earlier version of itself in the same run."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import shutil
import statistics
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from pipeline.backbones.lmm_processor import source_of
from pipeline.bench import measure
from pipeline.bench.serve import MODEL, TIMEOUT_S, service
from pipeline.bench.startup import RECIPE, write_random_adapter
from pipeline.config.load import load_recipe
from pipeline.config.paths import PROJECT
from pipeline.errors import UserError
from pipeline.hub.snapshots import checkpoint

SIDE = 48  # pixels of a picture's sides, as those of the embedded model's tasks
PICTURES = 16  # distinct ones; all questions are distinct
LEAST = 24  # questions of a measurement, also for one client
WEIGHTS = "model.safetensors"
WARM = 8  # questions to each service before the first measurement
PEAK = re.compile(r"^pipeline_serve_cache_peak_bytes (\d+)$", re.MULTILINE)


@dataclass(frozen=True)
class _Load:
    """One measurement of one service."""

    answers: list[tuple[str, int]]  # texts and numbers of tokens, in the order of the questions
    seconds: float
    processor_s: float  # of the service alone

    @property
    def rates(self) -> dict[str, float]:
        """Tokens and requests per second, and per second of the service's processor time."""
        tokens = sum(number for _, number in self.answers)
        return {
            "tokens_per_s": tokens / self.seconds,
            "tokens_per_processor_s": tokens / self.processor_s,
            "requests_per_s": len(self.answers) / self.seconds,
        }


def bench_clients(
    folder: Path | None,
    before: Path | None = None,
    clients: Sequence[int] = (1, 20, 200),
    requests: int = 400,
    tokens: int = 6,
    rounds: int = 3,
    batch: int | None = None,
) -> dict[str, Any]:
    """Measure the service with each number of clients, and that of another checkout of the project by turns.

    Args:
        folder: a run or an adapter; None: random prompt sets on the embedded model with an end token that is never
            chosen, so that all answers are `tokens` long.
        before: the other checkout; None: only this one is measured.
        clients: numbers of clients, each with one connection and one open request.
        requests: questions of one measurement; one client asks fewer, but at least 24.
        tokens: most tokens of an answer.
        rounds: repeats; in every other one the services are measured in the other order.
        batch: most answers decoded together; None: as each version does by default.

    Raises UserError for a checkout without the project and a folder that cannot be served.
    """
    if before is not None and not (before / "pipeline" / "__init__.py").is_file():
        raise UserError(
            f"--before {before} has no pipeline/__init__.py; expected a checkout of the project, for example by "
            "`git worktree add ../earlier COMMIT`."
        )
    checkouts = {"now": PROJECT} if before is None else {"before": before.resolve(), "now": PROJECT}
    with ExitStack() as stack:
        if folder is None:
            folder = _endless(Path(stack.enter_context(TemporaryDirectory())))
        options = [] if batch is None else ["--batch", str(batch)]
        services = {name: stack.enter_context(_started(folder, path, options)) for name, path in checkouts.items()}
        bodies = [_body(number, tokens) for number in range(max(requests, LEAST))]
        for one in services.values():
            one.ask(bodies[:WARM], 4)
        found: dict[tuple[int, str], list[_Load]] = {}
        for number in range(rounds):
            order = list(services) if number % 2 == 0 else list(reversed(services))
            for count in clients:
                asked = bodies[: max(LEAST, min(len(bodies), 10 * count))]
                for name in order:
                    load = services[name].ask(asked, count)
                    found.setdefault((count, name), []).append(load)
                    measure.tell(
                        f"round {number + 1}, {count} clients, {name}: {load.rates['tokens_per_s']:.1f} tokens/s"
                    )
        caches = {name: one.cache_bytes() for name, one in services.items()}
    variants = {f"{count} clients, {name}": _medians(loads) for (count, name), loads in found.items()}
    ratios, same = dict[str, dict[str, Any]](), list[bool]()
    for count in clients if before is not None else ():
        pairs = list(zip(found[count, "before"], found[count, "now"], strict=True))
        ratios[f"{count} clients"] = _ratios(pairs)
        same += [earlier.answers == now.answers for earlier, now in pairs]
    return {
        "folder": folder.name,
        "tokens": tokens,
        "batch": batch or "by default",
        "rounds": rounds,
        "machine": measure.machine("cpu"),
        "variants": variants,
        "ratios": {"before": ratios},
        "same_answers": all(same),
        "cache_peak_bytes": caches,
    }


@dataclass(frozen=True)
class _Service:
    port: int
    process: psutil.Process

    def ask(self, bodies: Sequence[bytes], clients: int) -> _Load:
        """Ask all questions from so many clients."""
        worked, began = self._processor_s(), time.perf_counter()
        answers = asyncio.run(_answers(self.port, bodies, clients))
        return _Load(answers, time.perf_counter() - began, self._processor_s() - worked)

    def cache_bytes(self) -> int | None:
        """The most bytes of keys and values at a time; None for a version that does not tell."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=TIMEOUT_S) as page:
            found = PEAK.search(page.read().decode())
        return None if found is None else int(found.group(1))

    def _processor_s(self) -> float:
        times = self.process.cpu_times()
        return float(times.user + times.system)


@contextmanager
def _started(folder: Path, checkout: Path, options: Sequence[str]) -> Iterator[_Service]:
    with service(folder, checkout, options) as (port, number):
        yield _Service(port, psutil.Process(number))


async def _answers(port: int, bodies: Sequence[bytes], clients: int) -> list[tuple[str, int]]:
    """Texts and numbers of tokens of the answers; every client asks its next question when it has its answer."""
    answers = [("", 0)] * len(bodies)

    async def client(first: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for number in range(first, len(bodies), clients):
            body = bodies[number]
            head = (
                f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n"
            )
            writer.write(head.encode() + body)
            answered = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = re.search(r"content-length: (\d+)", answered)
            content = await reader.readexactly(int(length.group(1)) if length else 0)
            if " 200 " not in answered.splitlines()[0]:
                raise RuntimeError(f"The service replied {answered.splitlines()[0]}: {content[:500]!r}")
            reply = json.loads(content)
            answers[number] = reply["choices"][0]["message"]["content"], reply["usage"]["completion_tokens"]
        writer.close()

    await asyncio.wait_for(asyncio.gather(*map(client, range(min(clients, len(bodies))))), TIMEOUT_S)
    return answers


def _medians(loads: Sequence[_Load]) -> dict[str, float]:
    return {rate: round(statistics.median(load.rates[rate] for load in loads), 2) for rate in loads[0].rates}


def _ratios(pairs: Sequence[tuple[_Load, _Load]]) -> dict[str, float]:
    """By how much the second of each pair is faster: medians over the rounds, with the least and the most."""
    found = dict[str, float]()
    for rate in ("tokens_per_s", "tokens_per_processor_s"):
        ratios = [now.rates[rate] / earlier.rates[rate] for earlier, now in pairs]
        found |= {rate: statistics.median(ratios), f"{rate}, least": min(ratios), f"{rate}, most": max(ratios)}
    return {name: round(ratio, 2) for name, ratio in found.items()}


def _endless(folder: Path) -> Path:
    """An adapter of random prompt sets on a copy of the embedded model, in which the end token has the score 0."""
    recipe = load_recipe(RECIPE)
    model = folder / "model"
    shutil.copytree(checkpoint(source_of(recipe.model)).folder, model)
    weights = load_file(model / WEIGHTS)
    (name,) = (name for name in weights if name.endswith("embed_tokens.weight"))  # the output layer has the same
    weights[name][AutoTokenizer.from_pretrained(model).eos_token_id] = 0
    save_file(weights, model / WEIGHTS, metadata={"format": "pt"})
    write_random_adapter(folder / "adapter", recipe.model.model_copy(update={"path": str(model)}))
    return folder / "adapter"


def _body(number: int, tokens: int) -> bytes:
    """The body of a request with a question about a noise picture."""
    pixels = np.random.default_rng(number % PICTURES).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    picture = io.BytesIO()
    Image.fromarray(pixels).save(picture, "PNG")
    address = "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
    parts = [
        {"type": "text", "text": f"how large is group {number} here?"},
        {"type": "image_url", "image_url": {"url": address}},
    ]
    fields = {"model": MODEL, "messages": [{"role": "user", "content": parts}], "max_tokens": tokens}
    return json.dumps(fields).encode()
