"""`check` of a task sequence: validates everything that a run needs, without training and without a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from pipeline.backbones.base_model import base_fingerprint
from pipeline.backbones.lmm import LMM
from pipeline.check import switches
from pipeline.check.data import CheckedData
from pipeline.check.device import Device
from pipeline.check.features import check_kept_features
from pipeline.check.findings import Findings, amount, counted, peak, run_checks, show
from pipeline.check.insertion import check_insertion, passes_twice
from pipeline.check.model import check_keys, check_model
from pipeline.check.pictures import cut_off
from pipeline.check.routing import TITLE, check_routing, keeps_keys
from pipeline.check.run_folder import check_run_folder
from pipeline.check.shipped import SHIPPED, check_shipped
from pipeline.check.switches import check_switches
from pipeline.config.data import DataConfig
from pipeline.config.models import ModelConfig
from pipeline.config.recipe import Recipe
from pipeline.config.task_file import contradictions
from pipeline.config.train import AUTO, TrainConfig
from pipeline.errors import UserError, require_extras
from pipeline.hub import repository as hub
from pipeline.methods import make_method
from pipeline.metrics.scoring import require_metrics
from pipeline.planning.auto import divided_plan, fastest, fits, least_for_zero2, without_gpus
from pipeline.planning.budget import USUAL_KEY_WIDTH, sized_decoder, trained_values, within_budget
from pipeline.planning.memory_plan import plan_memory
from pipeline.planning.model_files import ModelFiles, clip_key_width
from pipeline.planning.plan import GIB, MemoryPlan, Tokens
from pipeline.planning.replicas import ranks_per_replica
from pipeline.planning.smaller import smaller_settings
from pipeline.planning.workload import Workload
from pipeline.prompts.parts.base import kind_of
from pipeline.ranks.devices import require_usable_gpus, settle_accelerator, torch_build
from pipeline.ranks.environment import ranks_per_node
from pipeline.sequence.opened import require_fitting
from pipeline.sequence.vllm import require_answerable, server_of
from pipeline.training.deepspeed_config import accumulation, deepspeed_config, require_whole_weights

ASSUMED_GPU = 80 * GIB  # of the GPUs that a run is checked for on a machine without any


def check(recipe: Recipe, name: str, ranks: int | None = None, gpu_memory: float | None = None) -> Findings:
    """Check a recipe on this machine and print the results; problems are in the result, not raised.

    Args:
        recipe: the recipe.
        name: its name on the command line.
        ranks: the number of ranks to plan for; None: see `Device.ranks`.
        gpu_memory: plan for GPUs of so many GB (1e9 bytes), whatever this machine has; None: for this machine.
    """
    transformers_logging.set_verbosity_error()  # the checks report what it would warn about
    findings = Findings(device=Device.of(gpu_memory))
    with hub.no_waiting([recipe.model.path, recipe.keys.path]) as online:
        _look(findings, _sized(findings, recipe, online), name, findings.device.ranks(ranks, recipe), online)
    show(findings, name)
    return findings


def _sized(findings: Findings, recipe: Recipe, online: bool) -> Recipe:
    """The recipe with the size of its module that its budget allows, as far as the model's configuration is there."""
    budget = recipe.train.budget
    if budget is None:
        return recipe
    model = ModelFiles(recipe.model, online, recipe.data.cuts)
    sized: list[Recipe] = []

    def fits() -> str:
        try:
            decoder = sized_decoder(model.built, recipe.keys)
        except (UserError, OSError, ValueError, KeyError, ImportError):
            return f"not applied: the configuration of '{recipe.model.path}' is not available here"
        sized.append(within_budget(recipe, decoder))
        return f"{trained_values(sized[0], decoder):,} of {budget:,} values of the module per stage"

    run_checks(findings, {"budget": fits})
    return sized[0] if sized else recipe


def _look(findings: Findings, recipe: Recipe, name: str, ranks: int, online: bool) -> None:
    model, data = ModelFiles(recipe.model, online, recipe.data.cuts), CheckedData(recipe.data, recipe.run_path, name)
    identity: dict[str, str] | None = None

    def keys() -> str:
        nonlocal identity
        found, identity = check_keys(recipe.keys, online)
        return found

    def model_works() -> bool:
        return "model" not in findings.problems

    def checked_data() -> str:
        found = data.check(identity, (lambda: model.conversation) if model_works() else None)
        if model_works() and (doubts := cut_off(model, data.samples)):
            findings.warnings["data"] = doubts
        return found

    checks: dict[str, Callable[[], str]] = {
        "recipe": lambda: _recipe(recipe),
        "metrics": lambda: _metrics(recipe.data),
        "ranks": lambda: _ranks(recipe.train, ranks),
        "deepspeed": lambda: _deepspeed(recipe.train, recipe.model, findings.device),
        "model": lambda: check_model(model, here=not findings.device.asked),
        "evaluation": lambda: _evaluation(findings, recipe, ranks, model_works()),
        SHIPPED: lambda: check_shipped(findings, model),
        "insertion": lambda: check_insertion(recipe, model),
        switches.TITLE: lambda: check_switches(recipe, model, findings.device),
        "keys": keys,
        "data": checked_data,
        TITLE: lambda: check_routing(findings, recipe.method, recipe.data),
        "vision features": lambda: check_kept_features(recipe.data, model),
        "run folder": lambda: check_run_folder(recipe, model if model_works() else None, identity),
        "memory": lambda: _memory(findings, recipe, ranks, model, data),
    }
    if not model.shipped:
        del checks[SHIPPED]
    if recipe.evaluate.engine == "replicas":
        del checks["evaluation"]
    if not passes_twice(recipe):
        del checks["insertion"]
    if recipe.train.vision_features == "computed":
        del checks["vision features"]
    if not switches.chosen(recipe):
        del checks[switches.TITLE]
    if not keeps_keys(recipe.method):
        del checks[TITLE]
    run_checks(findings, checks)


def _recipe(recipe: Recipe) -> str:
    require_extras("train", *recipe.tracking.extras, "report")
    require_fitting(recipe)
    return f"{recipe.name}: {recipe.method.name}, {counted(len(recipe.data.tasks), 'task')}"


def _metrics(data: DataConfig) -> str:
    tasks = data.tasks
    require_metrics([task.metric for task in tasks])
    other = contradictions(data)
    note = f"; note: {'; '.join(other)}" if other else ""
    return f"{', '.join(f'{task.name} {task.metric}' for task in tasks)} ({data.scoring}){note}"


def _ranks(train: TrainConfig, ranks: int) -> str:
    require_usable_gpus()
    micro, steps = accumulation(train, ranks)
    return f"{ranks}, each {micro} samples x {steps} per step of {train.global_batch}; {torch_build()}"


def _deepspeed(train: TrainConfig, model: ModelConfig, device: Device) -> str:
    config = deepspeed_config(train, model.dtype, 1)  # the file's own faults; whether the ranks divide is another check
    settle_accelerator()
    try:
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig, get_zero_config

        zero: DeepSpeedZeroConfig = get_zero_config(config)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"'{train.deepspeed}' is refused by DeepSpeed ({reason}); correct it.") from error
    require_whole_weights(train, model.quantization)
    if train.deepspeed == AUTO and device.memory is not None:
        return f"{AUTO}: by the memory plan, {model.dtype}"
    return f"{train.deepspeed}: ZeRO stage {int(zero.stage)}, {model.dtype}"


def _memory(findings: Findings, recipe: Recipe, ranks: int, model: ModelFiles, data: CheckedData) -> str:
    """Plan the memory; obstacles have been reported by the checks that they belong to."""
    if {"recipe", "ranks", "deepspeed", "evaluation", "insertion"} & findings.problems.keys():
        return "not planned: method, packages, ranks, DeepSpeed file, evaluation or insertion are wrong"
    if SHIPPED in findings.problems:
        return "not planned: see the shipped numbers"
    shipped = f"; by the numbers of {recipe.model.path} that ship with the project" if model.shipped else ""
    try:
        built = model.built
    except (UserError, OSError, ValueError, KeyError, ImportError):
        return f"not planned: the configuration of '{recipe.model.path}' is not available here"
    tokens = model.assumed_tokens(data.samples) if "model" in findings.problems else model.tokens(data.samples)
    width = data.key_width or clip_key_width(recipe.keys) or USUAL_KEY_WIDTH
    _require_carried(recipe, built, width)
    work = Workload.of(recipe, width)
    device = findings.device
    train, note = _resolved(work, ranks, built, tokens, device)
    plan = findings.memory = plan_memory(work.trained_with(train), ranks, built, tokens, device.node())
    if doubts := _too_large(work, train, plan, built, tokens, device):
        findings.warnings["memory"] = doubts
    return peak(plan, device) + note + shipped


def _too_large(
    work: Workload, train: TrainConfig, plan: MemoryPlan, built: nn.Module, tokens: Tokens, device: Device
) -> list[str]:
    """What does not fit into the GPUs of a plan, and what would, in sentences; `train` has no `auto` settings."""
    memory, node = device.memory or ASSUMED_GPU, device.node()
    trained, answered = fits(plan.training, memory), fits(plan.evaluation, memory)
    divided = None if answered else divided_plan(work.trained_with(train), plan.ranks, built, tokens, node)
    helped = divided is not None and (device.memory is None or fits(divided.evaluation, memory))
    found = []
    if divided is not None and helped:
        found = [
            f"with a whole model on each rank answers take {amount(plan.evaluation)}, which does not fit GPUs of "
            f"{amount(memory)}; with evaluate.engine=sharded they take {amount(divided.evaluation)}"
        ]
    if device.memory is None or (trained and (answered or helped)):
        return found
    needs = [f"{amount(plan.training)} for training"] if not trained else []
    needs += [f"{amount(plan.evaluation)} for answers"] if not answered else []
    smaller = smaller_settings(work, plan.ranks, built, tokens, memory, node)
    if smaller is None:
        helps = (
            "no batch, recomputation or quantisation makes it fit: lower model.image_tokens, or plan for more GPUs "
            "(--ranks) or larger ones"
        )
    else:
        helps = f"it fits with {' '.join(f'--set {name}={value}' for name, value in smaller.items())}"
    return [*found, f"a rank needs {' and '.join(needs)}, and {device.room()} may be planned; {helps}"]


def _evaluation(findings: Findings, recipe: Recipe, ranks: int, model_works: bool) -> str:
    if recipe.evaluate.engine == "vllm":
        require_answerable(recipe)
        server = server_of(recipe, base_fingerprint(recipe.model)) if model_works else None
        if server is not None and (why := server.ailing()):
            findings.warnings["evaluation"] = [f"{why} A run needs the server when it evaluates."]
        return f"by the vLLM server at {recipe.evaluate.vllm_url}, with no model on the ranks"
    shards = ranks_per_replica(recipe.evaluate, recipe.model, ranks, findings.device.node() or ranks_per_node())
    return f"{counted(ranks // shards, 'model')}, each on {shards} ranks"


def _require_carried(recipe: Recipe, built: nn.Module, key_width: int) -> None:
    """Raise UserError where the model cannot carry what a stage learns, by making that on the meta device."""
    method = make_method(recipe.method)
    if method.part is not None:
        with torch.device("meta"):
            kind_of(method).keyed(LMM(built, None), method, key_width)


def _resolved(work: Workload, ranks: int, built: nn.Module, tokens: Tokens, device: Device) -> tuple[TrainConfig, str]:
    """The training settings with `auto` resolved for a device, and a note about them."""
    train = work.train
    if AUTO not in (train.deepspeed, train.checkpointing):
        return train, ""
    if device.memory is not None:
        chosen, _ = fastest(work, ranks, built, tokens, device.memory, device.node())
        return chosen, f"; auto: {chosen.deepspeed}, checkpointing {chosen.checkpointing}"
    chosen = without_gpus(train)
    if train.deepspeed != AUTO:
        return chosen, ""
    least = amount(least_for_zero2(work, ranks, built, tokens))
    return chosen, f"; auto: {chosen.deepspeed} without GPUs, ZeRO-2 on GPUs of {least} or more"
