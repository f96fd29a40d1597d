"""Results of `check` for either kind of recipe: a line per check, problems, warnings, and the memory plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.check.device import Device
from pipeline.errors import UserError, UserErrors
from pipeline.planning.auto import fits
from pipeline.planning.plan import BESIDE, GIB, MemoryPlan


@dataclass
class Findings:
    """Results by title of the check: a line each, problems, warnings, and the memory plan with its device."""

    device: Device = field(default_factory=lambda: Device.of(None))
    found: dict[str, str | None] = field(default_factory=dict)  # None: see the problems
    problems: dict[str, list[str]] = field(default_factory=dict)
    warnings: dict[str, list[str]] = field(default_factory=dict)
    memory: MemoryPlan | None = None

    def to_json(self) -> dict[str, Any]:
        """The result of `check --json`."""
        plan = self.memory
        memory = {"memory": plan.to_json() | self.device.to_json(plan.ranks, self.fits())} if plan else {}
        found = {title: text for title, text in self.found.items() if text is not None}
        said = {"problems": self.problems, "warnings": self.warnings}
        return {**found, **memory, "ok": not self.problems, **said}

    def fits(self) -> bool | None:
        """Whether the planned memory fits into the GPUs that it is planned for; None on CPUs and without a plan."""
        if self.memory is None or self.device.memory is None:
            return None
        return fits(self.memory.most, self.device.memory)

    def sentence(self, name: str) -> str:
        """The error of `check` for the user: one line per problem if there are several."""
        lines = [(title, sentence) for title, sentences in self.problems.items() for sentence in sentences]
        if len(lines) == 1:
            return lines[0][1]
        return "\n".join([f"check {name} found {len(lines)} problems:", *(f"- {title}: {s}" for title, s in lines)])


def run_checks(findings: Findings, checks: dict[str, Callable[[], str]]) -> None:
    """Run each check and store its line, or the errors that it raises as problems."""
    for title, look in checks.items():
        findings.found[title] = None
        try:
            findings.found[title] = look()
        except UserErrors as errors:
            findings.problems[title] = errors.sentences
        except UserError as error:
            findings.problems[title] = [str(error)]


def peak(plan: MemoryPlan, device: Device) -> str:
    """For which devices a memory plan is, whether it fits into them, and its peak, in words."""
    host = {"prefetched pixels": plan.waiting, "the modules of all tasks": plan.pool}
    large = [f"{amount(size)} for {what}" for what, size in host.items() if size >= GIB]
    waiting = f"; host memory per rank: {' and '.join(large)}" if large else ""
    said = f"{device.sentence(plan.ranks)}: "
    if device.memory is None:
        return f"{said}{amount(plan.most)} per rank at most{waiting}"
    said += "fits, " if fits(plan.most, device.memory) else "does not fit, see the warning; "
    return f"{said}{amount(plan.most)} per rank at most, {BESIDE}{waiting}"


def counted(number: int, what: str) -> str:
    """Return a number with its noun: 1 task, 2 tasks."""
    return f"{number} {what}{'s' * (number != 1)}"


def show(findings: Findings, name: str) -> None:
    """Print the results as tables."""
    console = Console()
    table = Table("check", "", "found", title=f"check {name}")
    for title, text in findings.found.items():
        wrong = findings.problems.get(title, [])
        doubtful = "[yellow]![/yellow]" if findings.warnings.get(title) else "[green]ok[/green]"
        mark = "[red]no[/red]" if wrong else doubtful
        if title == "memory" and findings.memory is None:
            mark = "--"
        table.add_row(title, mark, escape(text) if text else f"{counted(len(wrong), 'problem')}, named below")
    console.print(table)
    for title, sentences in findings.warnings.items():
        for sentence in sentences:
            console.print(f"[yellow]warning[/yellow]: {escape(f'{title}: {sentence}')}", highlight=False)
    if findings.memory is None:
        return
    plan = findings.memory
    title = f"memory plan for {findings.device.words(plan.ranks)}, ZeRO stage {plan.zero_stage}"
    table = Table("memory per rank", "training", "evaluation", "", title=title)
    for entry in plan.entries:
        table.add_row(entry.name, amount(entry.training), amount(entry.evaluation), entry.note)
    table.add_row("all", amount(plan.training), amount(plan.evaluation), "", style="bold")
    console.print(table)


def amount(count: int) -> str:
    """Bytes in GiB, or in MiB below a tenth of a GiB."""
    return f"{count / GIB:.2f} GiB" if count >= GIB // 10 else f"{count / (1 << 20):.2f} MiB"
