"""The list of published files, sources.yaml, as validated records."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from data_prep.sources.addresses import plain_name
from pipeline.errors import UserError, nearest

SOURCES = Path(__file__).with_name("sources.yaml")


class Record(BaseModel):
    """A record of sources.yaml; unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class File(Record):
    """A file at a fixed address, which goes `into` a folder below the root, or is an archive that is unpacked there."""

    url: str
    into: str | None = None
    unpack: str | None = None
    size: int | None = None  # bytes
    sha256: str | None = None
    licence: str | None = None
    terms: str | None = None  # the owner's page

    @property
    def name(self) -> str:
        """The file's name."""
        return urlsplit(self.url).path.rpartition("/")[2]

    @property
    def folder(self) -> str:
        """The folder below the root that gets its content."""
        return self.unpack or self.into or ""


class ByHand(Record):
    """What a person fetches, and why."""

    url: str
    into: str
    why: str


class Instructions(Record):
    """A folder of a dataset repository on the Hub; with `folder` "" the whole repository."""

    repository: str
    folder: str
    into: str


class Task(Record):
    """What a task needs beside its instructions."""

    files: list[str] = []
    hand: ByHand | None = None


class Benchmark(Record):
    """The files of a benchmark, and which of its tasks need them."""

    title: str
    instructions: Instructions
    files: dict[str, File]
    tasks: dict[str, Task] = Field(min_length=1)

    @model_validator(mode="after")
    def _named_files_exist(self) -> Benchmark:
        unknown = [name for task in self.tasks.values() for name in task.files if name not in self.files]
        if unknown:
            raise ValueError(f"no file is called {unknown[0]}")
        return self

    def chosen(self, tasks: Iterable[str]) -> list[str]:
        """The names of tasks as they are written here; all without any. UserError for an unknown one."""
        spelled = {plain_name(name): name for name in self.tasks}
        found = []
        for task in tasks:
            name = spelled.get(plain_name(task))
            if name is None:
                known = ", ".join(self.tasks)
                raise UserError(f"{self.title} has no task '{task}'; it has {known}.{nearest(task, self.tasks)}")
            found.append(name)
        return list(dict.fromkeys(found)) or list(self.tasks)

    def files_of(self, tasks: Iterable[str]) -> list[File]:
        """The files that tasks need, each once."""
        names = dict.fromkeys(name for task in tasks for name in self.tasks[task].files)
        return [self.files[name] for name in names]


@cache
def benchmarks() -> dict[str, Benchmark]:
    """The benchmarks of sources.yaml by name."""
    content = yaml.safe_load(SOURCES.read_text("utf-8"))
    return {name: Benchmark.model_validate(fields) for name, fields in content.items()}


def benchmark_named(name: str) -> Benchmark:
    """The benchmark of a name; UserError for an unknown one."""
    known = benchmarks()
    if name.lower() not in known:
        raise UserError(f"unknown benchmark '{name}'; expected {' or '.join(known)}.{nearest(name, known)}")
    return known[name.lower()]
