"""Loader processes: how they start, what they share, and how they say what is wrong."""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.data import loader
from pipeline.data.loader import loaded
from pipeline.errors import UserError


@pytest.fixture(params=["forkserver", "spawn"])
def _start_method(request: pytest.FixtureRequest) -> Iterator[None]:
    """The interpreter's default, as Python 3.14 has it on Linux, and macOS."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(request.param, force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


class Unpicklable:
    """As the processor of a model whose class is made inside a function."""

    def __init__(self, numbers: torch.Tensor) -> None:
        self.numbers = numbers

    def __reduce__(self) -> Any:
        raise TypeError("cannot be pickled")

    def __getitem__(self, item: int) -> torch.Tensor:
        return self.numbers[item]


@pytest.mark.usefixtures("_start_method")
def test_processes_need_no_pickle_whatever_the_interpreter_s_default_is() -> None:
    assert [int(item) for item in loaded(Unpicklable(torch.arange(6)), range(1, 6), workers=2)] == [1, 2, 3, 4, 5]


class MappedKeys:
    """The address and the kind of the mapping in which a process finds the keys."""

    def __init__(self, keys: torch.Tensor) -> None:
        self.keys = keys

    def __getitem__(self, item: int) -> list[float]:
        return [self.keys.data_ptr(), float(self.keys[item])]


def test_processes_share_the_keys_of_the_rank() -> None:
    """Without an interpreter of their own there is nothing to copy: they find them where the rank has them."""
    keys = torch.arange(4.0)
    assert list(loaded(MappedKeys(keys), range(4), workers=1)) == [[keys.data_ptr(), n] for n in range(4)]


class TooLong:
    def __getitem__(self, item: int) -> int:
        if item == 2:
            raise UserError("Sample c has 3000 tokens, and model.max_length is 2048; raise it.")
        return item


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_process_refuses_arrives_as_its_own_sentence(workers: int) -> None:
    items = loaded(TooLong(), range(4), workers)
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(UserError) as refused:
        next(items)
    assert str(refused.value) == "Sample c has 3000 tokens, and model.max_length is 2048; raise it."


def test_too_little_shared_memory_is_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out"

    class Killed:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def __iter__(self) -> Iterator[int]:
            raise RuntimeError(said)
            yield

    monkeypatch.setattr(loader, "DataLoader", Killed)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=64 << 20))
    with pytest.raises(UserError, match=r"4 loader processes ran out of shared memory \(/dev/shm of 64 MiB\).*--shm-"):
        list(loaded(TooLong(), range(2), workers=4))
    said = "something else"
    with pytest.raises(RuntimeError, match="something else"):
        list(loaded(TooLong(), range(2), workers=4))


def test_the_place_of_shared_memory_need_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "SHARED_MEMORY", Path("/nowhere"))
    assert "ran out of shared memory (/nowhere)," in loader.no_shared_memory(2)
