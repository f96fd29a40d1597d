"""One of two ranks that meet errors: `python -m tests.ranks.failing FOLDER`, or with a verb and its arguments too."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.cli.outcome import App
from pipeline.errors import Interrupted, MissingExtra, OutOfMemory, PipelineError, UserError, UserErrors
from pipeline.ranks.launch import end_as_rank
from pipeline.ranks.world import init_world, on_main, together
from pipeline.serve.refusal import RefusedError
from pipeline.training.loop import DivergedError


class KeepsItsWorker(DivergedError):
    """Has an attribute that cannot be pickled."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.worker = lambda: None


def _caused() -> None:
    try:
        raise KeyError("prompts")
    except KeyError as error:
        raise UserError("the file is damaged.") from error


def _here() -> type[PipelineError]:
    class Here(Interrupted):
        pass

    return Here


ERRORS: dict[str, Callable[[], BaseException]] = {
    "user": lambda: UserError("found this; expected that."),
    "users": lambda: UserErrors(["one.", "two."]),
    "extra": lambda: MissingExtra("deepspeed", "train"),
    "stopped": lambda: Interrupted("saved."),
    "memory": lambda: OutOfMemory("too small."),
    "diverged": lambda: DivergedError("step 3 is not a finite number."),
    "attributes": lambda: RefusedError("too large.", 413, "too_large"),
    "unpicklable": lambda: KeepsItsWorker("step 4."),
    "local class": lambda: _here()("stopped here."),
    "full disk": lambda: OSError(errno.ENOSPC, "No space left on device", "runs/x/run.json"),
    "bug": lambda: ZeroDivisionError("division by zero"),
}


def thrown(name: str) -> None:
    """Raise an error of the table."""
    raise ERRORS[name]()


def described(work: Callable[[], Any]) -> dict[str, Any]:
    """What `work` raises, as JSON."""
    try:
        work()
    except Exception as error:
        return {
            "class": type(error).__name__,
            "text": str(error),
            "code": getattr(error, "exit_code", None),
            "sentences": getattr(error, "sentences", None),
            "status": getattr(error, "status", None),
            "cause": None if error.__cause__ is None else str(error.__cause__),
        }
    return {"class": None}


def all_errors(folder: Path) -> None:
    """Let rank 0 raise every error, and rank 1 every one that has a sentence for users."""
    world = init_world()
    found = {name: described(lambda: on_main(world, lambda: thrown(name))) for name in ERRORS}  # noqa: B023
    found["cause"] = described(lambda: on_main(world, _caused))
    for name in ERRORS:
        if name != "bug":  # which `together` raises where it is met, while the others wait for the launcher
            found[f"together {name}"] = described(lambda: together(lambda: thrown(name) if world.rank else None))  # noqa: B023
    (folder / f"{world.rank}.json").write_text(json.dumps(found), encoding="utf-8")


app = App()


@app.command()
def main_rank(name: str) -> None:
    """Let rank 0 raise one error."""
    world = init_world()
    on_main(world, lambda: thrown(name))


@app.command()
def nothing() -> None:
    """A second verb, with which the first has a name."""


if __name__ == "__main__":
    if len(sys.argv) == 2:
        end_as_rank(lambda: all_errors(Path(sys.argv[1])))
    else:
        end_as_rank(lambda: app(sys.argv[2:]))
