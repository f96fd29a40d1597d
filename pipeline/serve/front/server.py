"""Starts the service in front of an engine, and the engine itself where none runs."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn

from pipeline.adapter.choosing import Chooser
from pipeline.adapter.vocabulary.export import ROUTER, export_checkpoint
from pipeline.errors import UserError
from pipeline.ranks.devices import choose_device
from pipeline.serve.front.engine import Behind, Engine, WrongCheckpointError
from pipeline.serve.front.front import Front
from pipeline.serve.front.process import EngineProcess, vllm_process
from pipeline.serve.front.sets import Folder, Sets
from pipeline.serve.options import ENGINE_KEY_VARIABLE, EngineOptions, Options
from pipeline.serve.refusal import RefusedError
from pipeline.serve.server import Door, opened, run

URL = re.compile(r"https?://[^/\s?#]+(/[^\s?#]*)?")


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
    folder = Folder(path, engine.form, options.unfamiliar, model, clip)
    sets = folder.read()
    if engine.behind is not None:
        url, key = engine.behind.rstrip("/").removesuffix("/v1"), os.environ.get(ENGINE_KEY_VARIABLE, "").strip()
        _serve(folder, sets, door, options, Behind(url, sets.form, key or None))
        return
    checkpoint = _checkpoint(path, sets, engine, model)
    process = vllm_process(checkpoint, engine, door.settings.model, sets.source.model.dtype, options.batch)
    for number in (signal.SIGINT, signal.SIGTERM):  # until the service handles them itself
        signal.signal(number, _interrupted)
    try:
        print(f"starting {' '.join(process.command)}", file=sys.stderr, flush=True)
        process.start()
        _serve(folder, sets, door, options, Behind(process.url, sets.form, process.key), process)
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
            export_checkpoint(path, checkpoint, engine.form, model)
    sets.require_export(checkpoint)
    return checkpoint


def _serve(
    folder: Folder, sets: Sets, door: Door, options: Options, behind: Behind, process: EngineProcess | None = None
) -> None:
    """Answer requests in front of an engine; UserError where it serves another checkpoint."""
    warning = asyncio.run(_first_look(Engine(behind)))
    if warning:
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    engine = Engine(behind)
    chooser = Chooser(sets.source, choose_device(None))
    front = Front(sets, chooser, engine, door.settings, options.batch + options.queue, folder.read)

    def close() -> None:
        if process is not None:
            process.stop()
        engine.abandon()

    run(front, door, options.quiet, close, f", answered by the engine at {behind.url}")


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
