"""Shared by the project's command lines: paths of verbs, help, results, and errors with their exit codes."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from pipeline.config.yaml_file import CONFIG, WRITTEN, recipe_names
from pipeline.errors import (
    EXIT_FAILURE,
    EXIT_OK,
    EXIT_RESUMABLE,
    EXIT_USER,
    Interrupted,
    UserError,
    for_user,
)
from pipeline.files.paths import RUNS, expanded
from pipeline.ranks.environment import is_distributed, rank
from pipeline.ranks.outcome import Outcome, leave_outcome
from pipeline.ranks.shutdown import STOP_SIGNALS

Result = dict[str, Any]
JSON = "--json"
PATH_TYPES = ("path", "file", "directory")  # names of click's path types
PATHS_AS_TEXT = ("recipe", "model", "clip")  # arguments that are a name, a Hub id or a path
FOLDERS_MADE_HERE = ("RUN", "ADAPTER")  # metavars of arguments that name the folder of a run or an adapter


def _version(wanted: bool) -> None:
    if wanted:
        # Not by an import: the package names sequences, and data_prep, which uses this, may not (import contracts).
        print(f"pipeline {sys.modules['pipeline'].__version__}")
        raise typer.Exit


ShowVersion = Annotated[
    bool, typer.Option("--version", is_eager=True, callback=_version, help="Show the version and exit.")
]


class ReportedError(UserError):
    """A UserError that the JSON output contains already, so only its sentence is printed to stderr."""


class _PlainHelp:
    """Help without types at flags and arguments, where Typer's output looks as if a value were expected."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters, without their types."""
        params = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            _show_plainly(param)
        return params


class Verb(_PlainHelp, TyperCommand):
    """A verb, whose paths are expanded, and which refuses a file in place of a folder."""

    def invoke(self, ctx: Any) -> Any:
        """Run the verb on its expanded paths."""
        for param in self.params:
            value = ctx.params.get(param.name)
            many = isinstance(value, list | tuple)
            given = list(value) if many else [value]
            if value is None or not (param.name in PATHS_AS_TEXT or _takes_paths(param, given)):
                continue
            paths = [type(path)(expanded(os.fspath(path))) for path in given]
            if str(param.metavar) in FOLDERS_MADE_HERE:
                for path in paths:
                    require_folder(Path(path))
            ctx.params[param.name] = paths if many else paths[0]
        return super().invoke(ctx)


class Verbs(_PlainHelp, TyperGroup):
    """Maps exceptions of a verb to exit codes, and writes the outcome file for the launcher."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen verb."""
        as_json = JSON in [*ctx._protected_args, *ctx.args]
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            shown = for_user(error)
            if isinstance(shown, Interrupted) and is_distributed():
                # A launcher that terminates the other ranks when one has exited must not change their exit code.
                for number in STOP_SIGNALS:
                    signal.signal(number, signal.SIG_IGN)
            if shown is not None:
                sentence = str(shown) or "stopped early; the same command resumes from here."
                finish(Outcome(shown.exit_code, sentence), as_json and not isinstance(shown, ReportedError))
            if "typer" in type(error).__module__ or "click" in type(error).__module__:
                if as_json and hasattr(error, "format_message"):
                    _print_json({"error": error.format_message(), "exit_code": EXIT_USER})
                raise  # Typer shows its usage errors itself
            traceback.print_exc()
            outcome = Outcome(EXIT_FAILURE, f"{type(error).__name__}: {error}")
            if not leave_outcome(outcome) and as_json:
                _print_json(_failure(outcome))
            raise typer.Exit(EXIT_FAILURE) from None


class App(typer.Typer):
    """A command line whose commands are `Verb`s."""

    def __init__(self, **options: Any) -> None:
        super().__init__(cls=Verbs, no_args_is_help=True, pretty_exceptions_enable=False, **options)

    def command(self, name: str | None = None, **options: Any) -> Callable[[Any], Any]:
        """As in Typer, with `Verb` as the class of commands."""
        return super().command(name, **{"cls": Verb, **options})


def show(result: Result, as_json: bool) -> None:
    """Print a result, or write it for the process that launched this rank."""
    if leave_outcome(Outcome(EXIT_OK, result=result)) or rank() != 0:
        return
    if as_json:
        _print_json(result)
        return
    for key, value in result.items():
        if not isinstance(value, dict | list):
            print(f"{key}: {value}")


def finish(outcome: Outcome, as_json: bool) -> NoReturn:
    """Exit with an outcome's exit code; prints its sentence on stderr, with --json also an object on stdout."""
    if not leave_outcome(outcome) and outcome.error:
        label = {EXIT_RESUMABLE: "stopped"}.get(outcome.code, "error")
        who = f" (rank {rank()})" if rank() else ""
        print(f"{label}{who}: {outcome.error}", file=sys.stderr, flush=True)
        if as_json and rank() == 0:
            _print_json(_failure(outcome))
    raise typer.Exit(outcome.code)


def require_folder(path: Path) -> None:
    """Raise UserError for a file, or a recipe's name, where the folder of a run or an adapter is expected."""
    if path.is_file():
        parents = [path.parent, *path.parent.parents]
        holder = next((folder for folder in parents if any((folder / file).is_file() for file in WRITTEN)), None)
        what = f", here '{holder}'" if holder is not None else ""
        raise UserError(f"'{path}' is a file; expected the folder of a run or an adapter{what}.")
    if not path.exists() and str(path) in recipe_names():
        runs = sorted(str(found.parent) for found in RUNS.glob(f"{path}-*/{CONFIG}"))
        there = f", such as '{runs[0]}'" if runs else f", which `python -m pipeline run {path}` makes"
        raise UserError(f"'{path}' is a recipe, not a folder; expected the folder of a run{there}.")


def _failure(outcome: Outcome) -> Result:
    return {"error": outcome.error, "exit_code": outcome.code}


def _print_json(content: Result) -> None:
    sys.stderr.flush()
    sys.stdout.flush()
    print(json.dumps(content), flush=True)


def _takes_paths(param: Any, given: list[Any]) -> bool:
    """Whether a parameter's values are paths, by their class or, where click leaves them as text, by its type."""
    return (
        all(isinstance(path, Path) for path in given) or getattr(getattr(param, "type", None), "name", "") in PATH_TYPES
    )


def _show_plainly(param: Any) -> None:
    argument = param.param_type_name == "argument"
    if argument:
        name = f"{param.metavar or param.name.upper()}{'...' * (param.nargs == -1)}"
        param.get_usage_pieces = lambda ctx: [name if param.required else f"[{name}]"]
    if argument or getattr(param, "is_flag", False):
        param.display_type_rich = lambda ctx=None: None
