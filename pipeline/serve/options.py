"""Options of `serve`, in a module without the serving libraries, so that the command line loads quickly."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.config.unfamiliar import Unfamiliar

KEY_VARIABLE = "PIPELINE_API_KEY"
BATCH = {"own": 256, "vllm": 32}  # most answers decoded together; the own engine admits as many as memory allows
ENGINE_KEY_VARIABLE = "PIPELINE_ENGINE_KEY"  # of an engine that was started by others


@dataclass(frozen=True)
class Options:
    """Options of `serve`.

    At most `batch` rows are decoded together and `queue` requests wait. `memory_gib` limits keys and values. `name` is
    the model's name for clients. Web pages of `origins` may send requests (CORS). `ignore_system` answers requests with
    system messages and ignores these. `quiet` omits the log line per request. `unfamiliar` is what becomes of questions
    that resemble no task, where a request does not say it; None: as the run's method says.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    batch: int = 32
    queue: int = 256
    memory_gib: float | None = None
    max_tokens: int = 256
    max_pixels: int = 4096 * 4096
    max_body: int = 8 << 20
    name: str | None = None
    origins: tuple[str, ...] = ()
    ignore_system: bool = False
    quiet: bool = False
    unfamiliar: Unfamiliar | None = None


EngineKind = Literal["own", "vllm"]
SetsForm = Literal["vocabulary", "parts", "lora"]


@dataclass(frozen=True)
class EngineOptions:
    """Options of `serve --engine vllm`: an engine that runs at `behind`, or how one is started.

    `checkpoint` is the export that it serves, written there first if nothing is there. `program` is the command `vllm`,
    None: that of this environment, else of PATH. `arguments` are further options of `vllm serve`. `form` is how it gets
    what was learned: vocabulary: prompt sets are tokens of the checkpoint; parts: each request brings their vectors;
    lora: it has low-rank updates loaded, and each request names one.
    """

    behind: str | None = None
    checkpoint: Path | None = None
    program: Path | None = None
    arguments: tuple[str, ...] = ()
    form: SetsForm = "vocabulary"
