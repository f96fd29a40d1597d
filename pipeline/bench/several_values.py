"""Options of a verb that take several values."""

from __future__ import annotations

from typing import Any

from pipeline.cli.outcome import Verb


class SeveralValues(Verb):
    """A verb whose repeatable options take several values behind one flag: `--routers mean ridge`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments with the flag repeated before each of its values."""
        repeatable = {flag for param in self.params if getattr(param, "multiple", False) for flag in param.opts}
        spread: list[str] = []
        flag: str | None = None
        for place, word in enumerate(args):
            if word.startswith("-"):
                flag = word if word in repeatable else None
            elif flag is not None and args[place - 1] != flag:
                spread.append(flag)
            spread.append(word)
        return super().parse_args(ctx, spread)
