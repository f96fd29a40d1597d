"""Looking at everything a run needs before any of it is computed, and before any GPU is touched."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.check.data import CheckedData, require_prepared
from pipeline.config.recipe import Recipe
from pipeline.config.task_file import contradictions
from pipeline.errors import UserError, UserErrors, require_extras
from pipeline.planning.memory_plan import BESIDE, GIB, MemoryPlan
from pipeline.ranks.devices import require_usable_gpus, settle_accelerator, torch_build
from pipeline.ranks.launch import is_distributed, local_processes
from pipeline.training.deepspeed_config import AUTO, accumulation, deepspeed_config

__all__ = ["Findings", "check", "require_prepared"]

ASSUMED_KEY_WIDTH = 768  # CLIP ViT-L's, of the paper


@dataclass
class Findings:
    """What `check` saw: a line for each check, the sentences of what is wrong or doubtful, and the memory plan."""

    found: dict[str, str | None] = field(default_factory=dict)  # None: see the problems
    problems: dict[str, list[str]] = field(default_factory=dict)
    warnings: dict[str, list[str]] = field(default_factory=dict)
    memory: MemoryPlan | None = None

    def to_json(self) -> dict[str, Any]:
        """All of it as one JSON object."""
        memory = {"memory": self.memory.to_json()} if self.memory else {}
        found = {title: text for title, text in self.found.items() if text is not None}
        said = {"problems": self.problems, "warnings": self.warnings}
        return {**found, **memory, "ok": not self.problems, **said}

    def sentence(self, name: str) -> str:
        """What the user is told when something is wrong: a line per problem if there are several."""
        lines = [(title, sentence) for title, sentences in self.problems.items() for sentence in sentences]
        if len(lines) == 1:
            return lines[0][1]
        return "\n".join([f"check {name} found {len(lines)} problems:", *(f"- {title}: {s}" for title, s in lines)])


def check(recipe: Recipe, name: str, ranks: int | None = None) -> Findings:
    """Check a recipe against this machine and print what was found; problems are in the result, not raised.

    `name` is what the user calls the recipe; `ranks` the number of processes it is meant for, by default those of this
    launch or those `run` would start here.
    """
    from transformers.utils import logging as transformers_logging

    from pipeline.hub import repository as hub

    transformers_logging.set_verbosity_error()  # what it would warn about, the checks say in sentences
    findings = Findings()
    with hub.no_waiting([recipe.model.path, recipe.keys.path]) as online:
        _look(findings, recipe, name, ranks or ranks_here(recipe), online)
    show(findings, name)
    return findings


def _look(findings: Findings, recipe: Recipe, name: str, ranks: int, online: bool) -> None:
    from pipeline.check.features import check_kept_features
    from pipeline.check.model import check_keys, check_model
    from pipeline.check.run_folder import check_run_folder
    from pipeline.planning.model_files import ModelFiles

    model, data = ModelFiles(recipe, online), CheckedData(recipe, name)
    identity: dict[str, str] | None = None

    def keys() -> str:
        nonlocal identity
        found, identity = check_keys(recipe, online)
        return found

    def model_works() -> bool:
        return "model" not in findings.problems

    checks: dict[str, Callable[[], str]] = {
        "recipe": lambda: _recipe(recipe),
        "metrics": lambda: _metrics(recipe),
        "ranks": lambda: _ranks(recipe, ranks),
        "deepspeed": lambda: _deepspeed(recipe),
        "model": lambda: check_model(model),
        "keys": keys,
        "data": lambda: data.check(identity, (lambda: model.conversation) if model_works() else None),
        "vision features": lambda: check_kept_features(recipe, model),
        "run folder": lambda: check_run_folder(recipe, model if model_works() else None, identity),
        "memory": lambda: _memory(findings, recipe, ranks, model, data),
    }
    if recipe.train.vision_features == "computed":
        del checks["vision features"]
    look_at_all(findings, checks)


def look_at_all(findings: Findings, checks: dict[str, Callable[[], str]]) -> None:
    """Do each check and keep what it found; what it raises goes among the problems under its title."""
    for title, look in checks.items():
        findings.found[title] = None
        try:
            findings.found[title] = look()
        except UserErrors as errors:
            findings.problems[title] = errors.sentences
        except UserError as error:
            findings.problems[title] = [str(error)]


def _recipe(recipe: Recipe) -> str:
    require_extras("train", *recipe.tracking.extras, "report")
    return f"{recipe.name}: {recipe.method.name}, {counted(len(recipe.data.tasks), 'task')}"


def _metrics(recipe: Recipe) -> str:
    from pipeline.metrics.scoring import require_metrics

    tasks = recipe.data.tasks
    require_metrics([task.metric for task in tasks])
    other = contradictions(recipe)
    note = f"; note: {'; '.join(other)}" if other else ""
    return f"{', '.join(f'{task.name} {task.metric}' for task in tasks)} ({recipe.data.scoring}){note}"


def ranks_here(recipe: Any, env: Mapping[str, str] = os.environ) -> int:
    """The ranks of this launch, or those that `run` would start here."""
    if is_distributed(env):
        return int(env.get("WORLD_SIZE") or env["SLURM_NTASKS"])
    return local_processes(recipe)


def _ranks(recipe: Recipe, ranks: int) -> str:
    require_usable_gpus()
    micro, steps = accumulation(recipe, ranks)
    return f"{ranks}, each {micro} samples x {steps} per step of {recipe.train.global_batch}; {torch_build()}"


def _deepspeed(recipe: Recipe) -> str:
    config = deepspeed_config(recipe, 1)  # the file's own faults; whether the ranks divide is another check
    settle_accelerator()
    try:
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig, get_zero_config

        zero: DeepSpeedZeroConfig = get_zero_config(config)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"'{recipe.train.deepspeed}' is refused by DeepSpeed ({reason}); mend it.") from error
    return f"{recipe.train.deepspeed}: ZeRO stage {int(zero.stage)}, {recipe.model.dtype}"


def _memory(findings: Findings, recipe: Recipe, ranks: int, model: Any, data: CheckedData) -> str:
    """Plan the memory; what keeps it from being planned has been said by the check it belongs to."""
    from pipeline.planning.memory_plan import plan_memory
    from pipeline.planning.model_files import clip_key_width
    from pipeline.planning.model_shape import meta_model

    if {"ranks", "deepspeed"} & findings.problems.keys():
        return "not planned: ranks or DeepSpeed file are wrong"
    known = ""
    try:
        config = model.config
    except UserError:
        known = f"; by the sizes of {recipe.model.path} that this project knows, for it is not here"
    try:
        if known:
            config = model.known()
        built = meta_model(recipe, config)
    except (UserError, OSError, ValueError, KeyError, ImportError):
        return f"not planned: the configuration of '{recipe.model.path}' cannot be had here"
    tokens = model.assumed_tokens() if "model" in findings.problems else model.tokens(data.samples)
    width = data.key_width or clip_key_width(recipe) or ASSUMED_KEY_WIDTH
    recipe, note = _fitted(recipe, ranks, width, built, tokens)
    plan = findings.memory = plan_memory(recipe, ranks, width, built, tokens)
    return peak(plan) + note + known


def _fitted(recipe: Recipe, ranks: int, width: int, built: Any, tokens: Any) -> tuple[Recipe, str]:
    """The recipe with what its `auto`s stand for on this machine, and the words for it."""
    import torch

    from pipeline.planning import auto as fitting

    train = recipe.train
    if AUTO not in (train.deepspeed, train.checkpointing):
        return recipe, ""
    if torch.cuda.is_available():
        chosen = fitting.fit_to_memory(recipe, ranks, width, built, tokens, fitting.gpu_memory(torch.device("cuda", 0)))
        return chosen, f"; auto: {chosen.train.deepspeed}, checkpointing {chosen.train.checkpointing}"
    chosen = fitting.without_gpus(recipe)
    if train.deepspeed != AUTO:
        return chosen, ""
    least = _amount(fitting.least_for_zero2(recipe, ranks, width, built, tokens))
    return chosen, f"; auto: {chosen.train.deepspeed} without GPUs, ZeRO-2 on GPUs of {least} or more"


def peak(plan: MemoryPlan) -> str:
    """What a memory plan comes down to."""
    waiting = f"; {_amount(plan.waiting)} of the host's memory per rank for pixels that wait" * (plan.waiting >= GIB)
    return f"{_amount(plan.most)} per rank at most for {plan.ranks} rank{'s' * (plan.ranks > 1)}, {BESIDE}{waiting}"


def counted(number: int, what: str) -> str:
    """Return a number with what it counts: 1 task, 2 tasks."""
    return f"{number} {what}{'s' * (number != 1)}"


def show(findings: Findings, name: str) -> None:
    """Print what was found as tables."""
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
    table = Table(
        "memory per rank", "training", "evaluation", "", title=f"ranks: {plan.ranks}, ZeRO stage {plan.zero_stage}"
    )
    for entry in plan.entries:
        table.add_row(entry.name, _amount(entry.training), _amount(entry.evaluation), entry.note)
    table.add_row("all", _amount(plan.training), _amount(plan.evaluation), "", style="bold")
    console.print(table)


def _amount(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB // 10 else f"{count / (1 << 20):.2f} MiB"
