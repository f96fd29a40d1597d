"""Starts the service in front of an engine, and the engine itself where none runs."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from pipeline.adapter.choosing import Chooser
from pipeline.adapter.load import source_of
from pipeline.adapter.source import Source
from pipeline.adapter.vocabulary.export import ADAPTER, ROUTER, export_vocabulary, require_rows
from pipeline.adapter.vocabulary.tokens import identity_of
from pipeline.backbones.lmm_weights import DTYPES
from pipeline.errors import UserError
from pipeline.ranks.devices import choose_device
from pipeline.serve.front.engine import Behind, Engine, WrongCheckpointError
from pipeline.serve.front.front import Front
from pipeline.serve.front.process import EngineProcess, vllm_process
from pipeline.serve.options import ENGINE_KEY_VARIABLE, EngineOptions, Options
from pipeline.serve.refusal import RefusedError
from pipeline.serve.server import Door, opened, run

URL = re.compile(r"https?://[^/\s?#]+(/[^\s?#]*)?")


@dataclass(frozen=True)
class Sets:
    """The prompt sets that are chosen from: where they are, what they are, and the identity of their vectors."""

    place: Path
    source: Source
    identity: str

    @classmethod
    def of(cls, path: Path, options: Options, model: str | None, clip: str | None) -> Sets:
        """Those of a run, an adapter or an exported checkpoint; UserError where they are no rows of a vocabulary."""
        place = path / ADAPTER if (path / ROUTER).is_file() else path
        source = source_of(place, model, clip, answers=False).with_unfamiliar(options.unfamiliar)
        require_rows(source.method, source.pool, place)
        pool = source.pool
        return cls(place, source, identity_of(pool.names, pool.prompts, DTYPES[source.model.dtype]))

    def require_export(self, checkpoint: Path) -> None:
        """Raise UserError unless the checkpoint in a folder was exported of these sets."""
        try:
            listed: Any = json.loads((checkpoint / ROUTER).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"'{checkpoint}' has no readable {ROUTER} ({error}); expected a checkpoint that `python -m pipeline "
                "export RUN DIR --as vocabulary` writes."
            ) from None
        if not isinstance(listed, dict) or listed.get("identity") != self.identity:
            raise UserError(
                f"'{checkpoint}' was exported of other prompt sets than those of '{self.place}', or by an earlier "
                f"version; run `python -m pipeline export {self.place} DIR --as vocabulary` and give the new folder."
            )


def serve_front(
    path: Path, options: Options, engine: EngineOptions, model: str | None = None, clip: str | None = None
) -> None:
    """Serve a run, an adapter or an exported checkpoint by a vLLM until SIGINT or SIGTERM.

    Args:
        path: folder of the run, the adapter or the checkpoint.
        options: of the service.
        engine: where vLLM runs, or how it is started.
        model: location of the frozen model, for an export that is not there yet; None: as recorded.
        clip: location of the frozen CLIP, None: as recorded.

    Raises UserError as `serve` does, and where vLLM is missing or too old, does not start, or serves another model.
    """
    if engine.behind is not None and not URL.fullmatch(engine.behind):
        raise UserError(f"--behind {engine.behind} is no address; expected one such as http://127.0.0.1:8001.")
    door = opened(path, options)
    sets = Sets.of(path, options, model, clip)
    if engine.behind is not None:
        url = engine.behind.rstrip("/").removesuffix("/v1")
        _serve(sets, door, options, url, os.environ.get(ENGINE_KEY_VARIABLE, "").strip() or None)
        return
    checkpoint = _checkpoint(path, sets, engine, model)
    process = vllm_process(checkpoint, engine, door.settings.model, sets.source.model.dtype, options.batch)
    for number in (signal.SIGINT, signal.SIGTERM):  # until the service handles them itself
        signal.signal(number, _interrupted)
    try:
        print(f"starting {' '.join(process.command)}", file=sys.stderr, flush=True)
        process.start()
        _serve(sets, door, options, process.url, process.key, process)
    finally:
        process.stop()


def _interrupted(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(0)


def _checkpoint(path: Path, sets: Sets, engine: EngineOptions, model: str | None) -> Path:
    """The checkpoint that vLLM is to serve, exported first where it is not there yet."""
    if (path / ROUTER).is_file():
        if engine.checkpoint is not None:
            raise UserError(f"'{path}' is an exported checkpoint itself; leave --checkpoint out.")
        checkpoint = path
    elif engine.checkpoint is None:
        raise UserError(
            f"--engine vllm serves an exported checkpoint, and '{path}' is a run or an adapter; give --checkpoint DIR, "
            "where it is written if it is not there yet, or --behind with the address of a server that has it."
        )
    else:
        checkpoint = engine.checkpoint
        if not checkpoint.exists():
            export_vocabulary(path, checkpoint, model)
    sets.require_export(checkpoint)
    return checkpoint


def _serve(
    sets: Sets, door: Door, options: Options, url: str, key: str | None, process: EngineProcess | None = None
) -> None:
    """Answer requests in front of the engine at `url`; UserError where it serves another checkpoint."""
    behind = Behind(url, sets.identity, sets.source.pool.names[-1], key)
    warning = asyncio.run(_first_look(Engine(behind)))
    if warning:
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    engine = Engine(behind)
    front = Front(Chooser(sets.source, choose_device(None)), engine, door.settings, options.batch + options.queue)

    def close() -> None:
        if process is not None:
            process.stop()
        engine.abandon()

    run(front, door, options.quiet, close, f", answered by the engine at {url}")


async def _first_look(engine: Engine) -> str:
    """Why the engine does not answer yet, "" where it does; UserError where it is another checkpoint's."""
    async with engine.connected():
        try:
            await engine.model()
        except WrongCheckpointError as error:
            raise UserError(str(error)) from None
        except RefusedError as error:
            return f"{str(error).removesuffix('; ask again later.')}; requests get status 503 until it is."
    return ""
