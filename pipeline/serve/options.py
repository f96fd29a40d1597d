"""How a service is offered: what the command line may say, read without the libraries that serve."""

from __future__ import annotations

from dataclasses import dataclass

KEY_VARIABLE = "PIPELINE_API_KEY"


@dataclass(frozen=True)
class Options:
    """How a service is offered; `batch` rows are decoded together, `queue` requests may wait.

    `memory_gib` bounds keys and values, `name` is what clients call the model, `origins` are those of pages that may
    ask from a browser, `ignore_system` answers requests with system messages, without heeding these, `quiet` leaves out
    the line per request.
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
