"""Batches copied ahead: the order of copies, waits and steps that a GPU would see, and what a CPU does instead."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.backbones import precision
from pipeline.backbones.lmm import load_lmm
from pipeline.config.models import ModelConfig
from pipeline.data import loader
from pipeline.data.loader import loaded
from pipeline.prompts.pool import PromptPool
from pipeline.ranks.world import init_world
from pipeline.sequence.engine import lmm_engine
from pipeline.training.copying import copies_ahead, on_device
from tests.training.worlds import KEY_WIDTH, make_recipe, make_samples, train_once

GPU = torch.device("cuda", 0)


class Watched:
    """A batch that tells when it is copied, on which stream, and for which stream its memory is kept."""

    def __init__(self, name: str, events: list[str], running: list[str]) -> None:
        self.name, self.events, self.running = name, events, running

    def to(self, device: torch.device) -> Watched:
        self.events.append(f"copy {self.name} on {self.running[-1]}")
        return self

    def tensors(self) -> list[Any]:
        return [self]

    def record_stream(self, stream: Any) -> None:
        self.events.append(f"keep {self.name} for {stream.name}")


class Stream:
    def __init__(self, name: str, events: list[str]) -> None:
        self.name, self.events = name, events

    def wait_stream(self, other: Stream) -> None:
        self.events.append(f"{self.name} waits for {other.name}")


def test_a_step_waits_for_its_copies_and_those_of_the_next_are_queued_before_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[str] = []
    running = ["main"]
    main, own = Stream("main", events), Stream("own", events)

    @contextlib.contextmanager
    def entered(stream: Stream) -> Iterator[None]:
        running.append(stream.name)
        yield
        running.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: own)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    steps = iter([[Watched(f"{step}{part}", events, running) for part in "ab"] for step in (1, 2)])
    for number, batches in enumerate(on_device(steps, GPU, ahead=True), 1):
        assert [batch.name for batch in batches] == [f"{number}a", f"{number}b"]
        events.append(f"step {number}")
    assert events == [
        "copy 1a on own",
        "copy 1b on own",
        "main waits for own",
        "keep 1a for main",
        "keep 1b for main",
        "copy 2a on own",
        "copy 2b on own",
        "step 1",
        "main waits for own",
        "keep 2a for main",
        "keep 2b for main",
        "step 2",
    ]


def test_without_steps_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    assert list(on_device(iter([]), GPU, ahead=True)) == []


def test_pinned_items_are_asked_of_torchs_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def loading(*_: Any, **options: Any) -> list[Any]:
        asked.append(options)
        return [1]

    monkeypatch.setattr(loader, "DataLoader", loading)
    assert list(loaded([1], [0], workers=0, pinned=True)) == list(loaded([1], [0], workers=0)) == [1]
    assert [options["pin_memory"] for options in asked] == [True, False]


def test_on_a_cpu_a_stage_is_the_same_and_says_that_nothing_is_copied_ahead(
    llava: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    learned = []
    for ahead in (False, True):
        recipe = make_recipe(llava, train__copy_ahead=ahead, train__steps=2)
        engine = lmm_engine(recipe, init_world(), KEY_WIDTH)
        with caplog.at_level(logging.INFO):
            learned.append(
                train_once(engine, recipe, init_world(), tmp_path / f"{ahead}", PromptPool(), make_samples(8))
            )
        assert ("train.copy_ahead does nothing on cpu" in caplog.text) == ahead
    torch.testing.assert_close(learned[1][1], learned[0][1], atol=0, rtol=0)
    assert copies_ahead(True, GPU) and not copies_ahead(False, GPU)


def test_tf32_is_set_on_a_gpu_that_has_it_and_else_told_to_do_nothing(
    llava: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = ModelConfig(path=str(llava), tf32=True)
    with caplog.at_level(logging.INFO):
        load_lmm(config)
    assert torch.get_float32_matmul_precision() == "highest"
    assert "model.tf32 does nothing on cpu" in caplog.text
    monkeypatch.setattr(precision, "has_tf32", lambda device: True)
    set_to: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", set_to.append)
    load_lmm(config)
    load_lmm(config.model_copy(update={"tf32": False}))
    assert set_to == ["high"]


def test_tf32_of_bfloat16_is_refused() -> None:
    with pytest.raises(ValueError, match="tf32 changes products of float32 numbers, and dtype is bfloat16"):
        ModelConfig(path="x", tf32=True, dtype="bfloat16")
