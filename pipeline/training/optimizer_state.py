"""Read and write the optimizer state of the trainables as full float32 tensors, under every ZeRO stage.

DeepSpeed stores moments in different places (docs/design.md 7.1): per parameter, per float32 master, or in flat buffers
that are split over the ranks. Here they have the parameters' names and shapes, so a state saved on N ranks can be
loaded on M.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

ADAM = ("exp_avg", "exp_avg_sq")  # torch's names of the two moments of AdamW
MOMENTUM = ("momentum_buffer",)  # torch's name of SGD's momentum
Moments = dict[str, dict[str, Tensor]]


class Optimised(Protocol):
    """The parts of an engine used here: DeepSpeed's optimizer, the trainables by name, the names of the moments."""

    trainables: dict[str, nn.Parameter]

    @property
    def optimizer(self) -> Any: ...

    @property
    def moment_kinds(self) -> tuple[str, ...]: ...


def read_moments(engine: Optimised) -> Moments:
    """The engine's `moment_kinds` of every trainable, `{kind: {name: tensor}}` in float32 on the CPU.

    All ranks must call it, after at least one optimizer step.
    """
    _link(engine)
    return {
        kind: {name: _read(engine, parameter, kind) for name, parameter in engine.trainables.items()}
        for kind in engine.moment_kinds
    }


def write_moments(engine: Optimised, step: int, moments: Moments) -> None:
    """Set the optimizer's moments and its number of steps; all ranks must call it with the same values."""
    inner = _inner(engine)
    for owner in _owners(engine):
        state = inner.state[owner]
        for kind in engine.moment_kinds:
            if state.get(kind) is None:  # torch creates moments at the first step, which a new process has not taken
                state[kind] = torch.zeros_like(owner)
        if engine.moment_kinds != ADAM:
            continue
        # DeepSpeed has no interface for the step count; without it Adam's bias correction would be wrong.
        if isinstance(state.get("step"), Tensor):
            state["step"].fill_(float(step))
        else:
            state["step"] = torch.tensor(float(step), dtype=torch.float32)
    _link(engine)
    for kind in engine.moment_kinds:
        for name, parameter in engine.trainables.items():
            _write(engine, parameter, kind, moments[kind][name])


@torch.no_grad()
def give_parts(parameter: nn.Parameter, value: Tensor, kind: str | None = None) -> None:
    """Set this rank's shards of a parameter's float32 master, or of its moment `kind`, from a full tensor.

    All ranks must call it with the same value; without ZeRO it does nothing. ZeRO-3 pads the last rank's shard.
    DeepSpeed's function for full tensors does not handle this padding: it fails, for example, for 128 values on 3
    ranks.
    """
    from deepspeed import utils

    value = value.to(parameter.device).float()
    if not hasattr(parameter, "ds_id"):
        if kind is None:
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, kind)
        return
    divided: Any = parameter
    size, group = divided.ds_tensor.numel(), divided.ds_process_group
    missing = size * dist.get_world_size(group) - value.numel()
    part = nn.functional.pad(value.flatten(), (0, missing)).split(size)[dist.get_rank(group)]
    if kind is None:
        utils.safe_set_local_fp32_param(parameter, part)
    else:
        utils.safe_set_local_optimizer_state(parameter, part, kind)


def master_of(optimizer: Any, parameter: nn.Parameter) -> Tensor | None:
    """The float32 master of a parameter in DeepSpeed's bfloat16 optimizer without ZeRO; None for other optimizers."""
    masters = getattr(optimizer, "fp32_groups", [])
    if not masters:
        return None
    for group, copies in zip(optimizer.fp16_groups, masters, strict=True):
        for candidate, master in zip(group, copies, strict=True):
            if candidate is parameter:
                return master
    return None


def _link(engine: Optimised) -> None:
    """Recreate the parameters' views into the flat moments of ZeRO-1 and ZeRO-2, through which they are accessed.

    DeepSpeed creates them once, after the first step of the first parameter group, when the other groups have no
    moments yet.
    """
    link = getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:
        engine.optimizer._hp_optimizer_states_linked = False
        link()


def _inner(engine: Optimised) -> Any:
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _owners(engine: Optimised) -> list[Tensor]:
    """The tensors that the wrapped optimizer updates, which are the keys of its state."""
    for flat in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):  # ZeRO 3; 1 and 2
        if hasattr(engine.optimizer, flat):
            return list(getattr(engine.optimizer, flat))
    return [owner for parameter in engine.trainables.values() if (owner := _owner(engine, parameter)) is not None]


def _owner(engine: Optimised, parameter: nn.Parameter) -> Tensor | None:
    """Without ZeRO the parameter's float32 master, or the parameter itself; under ZeRO None."""
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        return None
    master = master_of(engine.optimizer, parameter)
    return parameter if master is None else master


def _read(engine: Optimised, parameter: nn.Parameter, kind: str) -> Tensor:
    from deepspeed.utils import safe_get_full_optimizer_state

    owner = _owner(engine, parameter)
    if owner is None:
        value = safe_get_full_optimizer_state(parameter, kind)
    else:
        value = _inner(engine).state[owner].get(kind)
        if value is None:
            value = torch.zeros_like(owner)  # torch has no state for parameters that never had a gradient
    return value.detach().float().cpu().clone()


@torch.no_grad()
def _write(engine: Optimised, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
    owner = _owner(engine, parameter)
    if owner is None:
        give_parts(parameter, value, kind)
    else:
        _inner(engine).state[owner][kind].copy_(value)
