"""Regional compilation: one layer's code, compiled by torch once and reused for all layers of its kind.

A layer's weights are inputs of the compiled code, so the number of compilations depends neither on the number of layers
nor on that of steps. Shapes are compiled as variables. The decoder's last layer, of which only some rows are computed
(`pipeline.backbones.last_layer`), stays as it is.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.backbones.lmm import LMM

COMPILERS = ("g++", "clang++", "c++")


class Compiled:
    """The layers of a frozen model that run compiled inside `active`.

    Raises UserError where the decoder's layers take other arguments than hidden states first, or where the tower is to
    be compiled and has no layers that are alike.
    """

    def __init__(self, lmm: LMM, tower: bool = False, backend: str | Callable[..., Any] = "inductor") -> None:
        """`tower`: the vision tower's layers too; `backend`: torch.compile's."""
        decoder: list[nn.Module] = list(lmm.decoder.layers)[:-1]  # type: ignore[arg-type]
        self._tower = frozenset(tower_layers(lmm) if tower else ())
        self.layers = frozenset(decoder) | self._tower
        self._run = torch.compile(_call, dynamic=True, backend=backend)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Run the layers compiled while the block runs; hooks before and behind a layer stay outside of the code.

        Not where operations are watched one by one, as for their count: torch would then leave the layers' code as it
        is for good.
        """
        if is_in_torch_dispatch_mode():
            yield
            return
        for layer in self.layers:
            run = functools.partial(self._run, layer)
            layer.forward = functools.partial(_without_hooks, layer, run) if layer in self._tower else run
        try:
            yield
        finally:
            for layer in self.layers:
                layer.__dict__.pop("forward", None)  # recomputation has put its own in its place and removed it


def _without_hooks(layer: nn.Module, run: Callable[..., Any], *given: Any, **named: Any) -> Any:
    """Run a layer without the hooks inside it.

    transformers puts hooks into a tower whose hidden states are asked for, which could record attention and do nothing
    here. They cannot be compiled, and would cut the code of each layer into pieces.
    """
    inner = [module for module in layer.modules() if module is not layer and module._forward_hooks]
    hooks = [module._forward_hooks for module in inner]
    for module in inner:
        module._forward_hooks = OrderedDict()
    try:
        return run(*given, **named)
    finally:
        for module, before in zip(inner, hooks, strict=True):
            module._forward_hooks = before


def _call(layer: nn.Module, *given: Any, **named: Any) -> Any:
    return type(layer).forward(layer, *given, **named)


def tower_layers(lmm: LMM) -> Sequence[nn.Module]:
    """The layers of the vision tower, all of one class; UserError where it has none."""
    family = lmm.family
    decoder = {id(module) for module in lmm.decoder.modules()}
    lists = [
        module
        for module in lmm.model.model.modules()
        if isinstance(module, nn.ModuleList) and id(module) not in decoder and len({*map(type, module)}) == 1
    ]
    if not family.compiles_tower or not lists:
        raise UserError(
            f"train.compile decoder_and_tower is not possible with this {family.kind} model, whose vision tower has no "
            "layers with the same code for all images; expected decoder."
        )
    longest: nn.ModuleList = max(lists, key=len)
    return list(longest)


def require_compiler(device: torch.device) -> None:
    """Raise UserError where torch.compile has nothing to compile with: a C++ compiler for CPUs, Triton for GPUs."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise UserError(
                "train.compile needs the package triton for GPUs, and it is not installed; install a build of torch "
                "with CUDA, which brings it, or set train.compile to none."
            )
        return
    named = os.environ.get("CXX")
    if not any(map(shutil.which, (named,) if named else COMPILERS)):
        raise UserError(
            f"train.compile needs a C++ compiler on CPUs, and {named or ', '.join(COMPILERS)} was not found; install "
            "one, name it in the variable CXX, or set train.compile to none."
        )


def counted_compilations() -> int:
    """Number of graphs that torch.compile has made in this process."""
    from torch._dynamo.utils import counters  # seconds of imports, which only compiled runs need

    return int(counters["stats"]["unique_graphs"])
