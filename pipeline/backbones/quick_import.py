"""Imports transformers' model classes without the packages that only other uses of them need.

`transformers.modeling_utils`, which every model class needs, imports torch's compiler, distributed tensors (and with
them sympy), FSDP, distributed checkpoints, scipy's optimisers and accelerate. These take two thirds of the time until a
small model's first answer, and answering calls none of them. While `import_model_classes` runs, an import of such a
package by a module of transformers gives a `Deferred` for each name instead, which imports the package when it is used.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.ranks.collector import importing
from pipeline.ranks.environment import ALONE, launched_place

# What the model and processor classes import.
NEEDED = (
    "transformers.modeling_utils",
    "transformers.processing_utils",
    "transformers.generation.utils",
    "transformers.masking_utils",
    "transformers.modeling_layers",
)
IMPORTER = "transformers."
DEFERRED = (
    "accelerate",
    "scipy",
    "torch._dynamo",
    "torch.distributed._composable",
    "torch.distributed._functional_collectives",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
)
_lock = threading.Lock()
_importing = False  # whether a call of a `Deferred` is put off too


class Deferred:
    """An object that is made when it is used: called, subclassed, or asked for an attribute.

    `isinstance` is False as long as nobody has imported its module, for then no instance can exist.
    """

    def __init__(self, module: str, make: Callable[[], Any]) -> None:
        self._module, self._make = module, make

    @classmethod
    def of(cls, module: str, name: str) -> Deferred:
        """An object by its name in a module, which is imported with the first use."""
        return cls(module, lambda: getattr(importlib.import_module(module), name))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked for by typing and inspect, which take any object
            raise AttributeError(name)
        return getattr(self._make(), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _importing:  # a default, or an entry of a table
            return Deferred(self._module, lambda: self._make()(*args, **kwargs))
        return self._make()(*args, **kwargs)

    def __instancecheck__(self, instance: object) -> bool:
        return self._module in sys.modules and isinstance(instance, self._make())

    def __subclasscheck__(self, subclass: type) -> bool:
        return self._module in sys.modules and issubclass(subclass, self._make())

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._make(),)

    def __or__(self, other: Any) -> Any:
        return Any  # a union in an annotation

    __ror__ = __or__


def import_model_classes() -> None:
    """Import what every model class of transformers needs; does nothing where it is imported already.

    In one of several ranks nothing is deferred: there a program may use transformers' own parallel layers, whose tables
    hold placements of distributed tensors, which torch looks into.
    """
    with _lock:
        if all(name in sys.modules for name in NEEDED):
            return
        if (launched_place() or ALONE).size > 1:
            return
        import torch

        with importing(), _one_scan(), deferring(calls=True), _compiler_marks(torch):
            for name in NEEDED:
                importlib.import_module(name)


@contextlib.contextmanager
def _one_scan() -> Iterator[None]:
    """While the block runs, `transformers.models` takes its names from what `transformers` found when it was imported.

    Each of the two reads the sources of all models to find them, half a second apart from each other.
    """
    from transformers.utils import import_utils

    if "transformers.models" in sys.modules:
        yield
        return
    scan = import_utils.define_import_structure
    models = Path(import_utils.__file__).parents[1] / "models"

    def known(path: str, prefix: str | None = None) -> Any:
        if Path(path) != models / "__init__.py" or prefix is not None:
            return scan(path, prefix)
        named = scan(models, prefix="models")  # cached; it holds the other modules of transformers too
        return {
            needed: {name.removeprefix("models."): what for name, what in found.items() if name.startswith("models.")}
            for needed, found in named.items()
        }

    import_utils.define_import_structure = known
    try:
        yield
    finally:
        import_utils.define_import_structure = scan


@contextlib.contextmanager
def deferring(calls: bool = False) -> Iterator[None]:
    """While the block runs, modules of transformers that import one of DEFERRED get `Deferred` objects.

    With `calls`, for module code, what such an object would return is put off too. It takes the place of
    `builtins.__import__`, because neither a finder on `sys.meta_path` nor an entry in `sys.modules` knows who imports:
    torch's own modules and those of other threads would be given stand-ins too, and keep them.
    """
    global _importing
    plain = builtins.__import__

    def importing(
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        importer = str((globals or {}).get("__name__", ""))
        if level == 0 and fromlist and importer.startswith(IMPORTER) and _is_deferred(name):
            stand_in = ModuleType(name)
            vars(stand_in).update({wanted: Deferred.of(name, wanted) for wanted in fromlist})
            return stand_in
        return plain(name, globals, locals, fromlist or (), level)

    builtins.__import__, _importing = importing, calls
    try:
        yield
    finally:
        builtins.__import__, _importing = plain, False


def _is_deferred(name: str) -> bool:
    """Whether an import of this module is put off: it is one of DEFERRED, and nobody has imported it."""
    return name not in sys.modules and any(name == each or name.startswith(f"{each}.") for each in DEFERRED)


@contextlib.contextmanager
def _compiler_marks(torch: Any) -> Iterator[None]:
    """While the block runs, decorators of torch's compiler mark a function without importing the compiler.

    `disable` and `assume_constant_result` are the attributes by which the compiler knows such functions.
    `allow_in_graph` fills a table of the compiler instead, so functions that transformers marks with it (of its FP8
    kernels, and a check of the model class) are traced as others are where a program compiles a model afterwards.
    """
    if "torch._dynamo" in sys.modules:
        yield
        return
    marks = ModuleType("torch._dynamo")
    plain = {name: getattr(torch.compiler, name) for name in ("disable", "allow_in_graph", "assume_constant_result")}
    disable = _marking("_torchdynamo_disable")
    constant = _marking("_dynamo_marked_constant")
    changed = {"disable": disable, "allow_in_graph": _marking(None), "assume_constant_result": constant}
    vars(marks).update(changed)
    vars(torch.compiler).update(changed)
    torch._dynamo = marks
    try:
        yield
    finally:
        vars(torch.compiler).update(plain)
        vars(torch).pop("_dynamo", None)  # torch imports it when it is asked for


def _marking(attribute: str | None) -> Callable[..., Any]:
    """A decorator, with or without arguments, that sets an attribute of the function to True."""

    def mark(function: Any = None, *_: Any, **__: Any) -> Any:
        if function is None:
            return mark
        if attribute is not None:
            setattr(function, attribute, True)
        return function

    return mark
