"""A module, its trainables and their optimizer under DeepSpeed: one engine for every ZeRO stage and precision."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pipeline.training.normaliser import Normaliser
from pipeline.training.operations import OperationCount, counting
from pipeline.training.optimizer_state import ADAM, Moments, give_parts, master_of, write_moments


@dataclass(frozen=True)
class Group:
    """A parameter group of the optimizer: trainables that share a learning rate."""

    parameters: Sequence[nn.Parameter]
    rate: float


class TrainedModule(Protocol):
    """What the engine asks of the module it trains, beside `forward(batch, normaliser) -> (loss, terms by name)`."""

    counts_tokens: bool  # whether its batches count the tokens of answers

    @property
    def term_names(self) -> tuple[str, ...]: ...

    def total(self, terms: Sequence[float]) -> float: ...


class Companion(Protocol):
    """An object with a state that is updated after every micro-batch and saved in checkpoints inside a stage."""

    def passed(self, values: Callable[[], dict[str, Tensor]]) -> None: ...

    def state(self) -> dict[str, Tensor]: ...


class Engine:
    """A module whose trainables keep their shapes, so that a new stage only sets new values.

    `Engine.optimizer` and `Engine.engine` are DeepSpeed's. A `companion` is called after every micro-batch. Where a
    `count` is given, the operations of the next micro-batch are added to it.
    """

    def __init__(
        self,
        module: Any,
        trainables: Mapping[str, nn.Parameter],
        groups: Sequence[Group],
        make_optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        config: dict[str, Any],
        moment_kinds: tuple[str, ...] = ADAM,
    ) -> None:
        """All ranks construct it together, after `start_deepspeed`.

        Args:
            module: a `TrainedModule` on this rank's device.
            trainables: the trainable parameters, by their names in checkpoints.
            groups: the same parameters by learning rate; DeepSpeed refuses an empty group.
            make_optimizer: makes a torch optimizer from parameter groups.
            config: DeepSpeed's configuration, with micro-batch and accumulation.
            moment_kinds: torch's names of the optimizer's moments per trainable.
        """
        deepspeed = start_deepspeed()
        self.module, self.trainables, self.moment_kinds = module, dict(trainables), moment_kinds
        self.zero_stage = int(config.get("zero_optimization", {}).get("stage", 0))
        self.micro_batch: int = config["train_micro_batch_size_per_gpu"]
        self.accumulation: int = config["gradient_accumulation_steps"]
        self.companion: Companion | None = None
        self.count: OperationCount | None = None
        if self.zero_stage == 3:
            gather_layer_by_layer(module)
        self.rates = [group.rate for group in groups]
        optimizer = make_optimizer([{"params": list(group.parameters), "lr": group.rate} for group in groups])
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=config, dist_init_required=False
        )

    @property
    def term_names(self) -> tuple[str, ...]:
        """The module's loss terms."""
        names: tuple[str, ...] = self.module.term_names
        return names

    @property
    def counts_tokens(self) -> bool:
        """Whether its batches count the tokens of answers."""
        return bool(self.module.counts_tokens)

    def restart(self, values: Mapping[str, Tensor]) -> None:
        """Set the trainables (the same values on every rank) and reset the optimizer state."""
        self._set_values(values)
        # Reset moments and step count of the previous stage. DeepSpeed has no interface for the step count, which is
        # only in the state of the wrapped optimizer (docs/design.md 7.1).
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        for state in inner.state.values():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    value.zero_()
                elif key == "step":
                    state[key] = 0
        self.engine.train()

    def resume(self, values: Mapping[str, Tensor], step: int, moments: Moments) -> None:
        """Resume a stage: set trainables and moments to those after `step` optimizer steps."""
        self._set_values(values)
        write_moments(self, step, moments)

    def rest(self) -> dict[str, Tensor]:
        """The companion's state, which the next steps depend on besides trainables and moments; equal on every rank."""
        return {} if self.companion is None else self.companion.state()

    def values(self) -> dict[str, Tensor]:
        """The trainables in float32 on the CPU, by name; all ranks must call it."""
        return {name: self._value(parameter) for name, parameter in self.trainables.items()}

    def scale_learning_rates(self, factor: float) -> None:
        """Set the learning rates of the next optimizer step to each group's rate times `factor`."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor

    def accumulate(self, batch: Any, normaliser: Normaliser) -> Tensor:
        """Forward and backward pass of one micro-batch; returns its loss terms [K] in the order of `term_names`."""
        count, self.count = self.count, None
        with counting(count):
            loss, terms = self.engine(batch, normaliser)
            self.engine.backward(loss)
        if count is not None:
            count.samples += len(batch.ids)
        return torch.stack([terms[name] for name in self.term_names])

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        """The gradients of a loss by the trainables' names, of this rank alone: nothing is accumulated or stepped."""
        found = torch.autograd.grad(loss, list(self.trainables.values()), allow_unused=True)
        # ZeRO-3 gathers weights for the backward pass of every module and frees the last of them only in a step.
        gathered = getattr(self.optimizer, "parameter_offload", None)
        if gathered is not None:
            gathered.partition_all_parameters()
        return {name: value for name, value in zip(self.trainables, found, strict=True) if value is not None}

    def total(self, terms: Sequence[float]) -> float:
        """The total loss from its terms."""
        loss: float = self.module.total(terms)
        return loss

    def step(self) -> None:
        """Count the micro-batch; after the last one of an optimizer step DeepSpeed updates the trainables."""
        self.engine.step()
        if self.companion is not None:
            self.companion.passed(self.values)

    def gradient_norm(self) -> float | None:
        """Norm of the last step's gradient before clipping; None where DeepSpeed did not compute it."""
        norm = self.engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def _value(self, parameter: nn.Parameter) -> Tensor:
        """The float32 master of a parameter where there is one, else the parameter itself, on the CPU."""
        from deepspeed.utils import safe_get_full_fp32_param  # a heavy import, of training alone

        master = master_of(self.optimizer, parameter)
        if master is None:
            master = safe_get_full_fp32_param(parameter)
        return (parameter if master is None else master).detach().float().cpu().clone()

    @torch.no_grad()
    def _set_values(self, values: Mapping[str, Tensor]) -> None:
        """Set float32 masters and parameters; with the master alone the next forward pass would use the old value."""
        for name, parameter in self.trainables.items():
            value = values[name].to(parameter.device)
            master = master_of(self.optimizer, parameter)
            if master is not None:
                master.copy_(value)
            give_parts(parameter, value)
            with _gathered_to_write(parameter):
                parameter.data.copy_(value)


def start_deepspeed() -> Any:
    """The deepspeed module, initialised with the existing process group and with fewer log messages."""
    import deepspeed  # seconds of imports, which only training needs

    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    logger.addFilter(_no_news)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|deepspeed")
    _skip_compiled_collectives()
    deepspeed.init_distributed(dist_init_required=False)
    return deepspeed


def _no_news(record: logging.LogRecord) -> bool:
    """Filter out DeepSpeed's warning about torch optimizers that it does not list; those used here are tested."""
    return "untested optimizer" not in record.getMessage()


def gather_layer_by_layer(module: nn.Module) -> None:
    """Make ZeRO-3 gather each encoder and decoder layer as a whole, not submodule by submodule.

    The layers are those in transformers' `_no_split_modules`. With hooks on every submodule a step of a small model
    spends more time in hooks and small gathers than in arithmetic; whole layers made it 1.5 times as fast.
    """
    from deepspeed.utils import set_z3_leaf_modules  # a heavy import, of training alone

    layers = {name for part in module.modules() for name in getattr(part, "_no_split_modules", None) or ()}
    set_z3_leaf_modules(module, sorted(layers), raise_if_not_found=False)


def _skip_compiled_collectives() -> None:
    """Keep DeepSpeed on CPUs from compiling its own collectives for minutes; gloo suffices for small tensors."""
    import deepspeed.ops  # a heavy import, of training alone

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@contextlib.contextmanager
def _gathered_to_write(parameter: nn.Parameter) -> Iterator[None]:
    if not hasattr(parameter, "ds_id"):
        yield
        return
    import deepspeed  # a heavy import, of training alone

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        yield
