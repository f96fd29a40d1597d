"""Memory of the batch: how much is kept, who is let in, and what becomes of answers when an allocation fails."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pipeline.adapter.answering import Answerer, Question
from pipeline.serve.decoder import Running, RunningBatch
from pipeline.serve.memory import Extent, KeyValueMemory, is_out_of_memory
from pipeline.serve.request import Request, Update
from pipeline.serve.worker import Worker
from tests.adapters import question

ASKED = [question(n % 3, variant=n % 4, with_image=n % 5 != 4) for n in range(6)]


class Allocator:
    """A device that has no memory for more than so many rows at once; what it refused is counted."""

    def __init__(self, rows: int) -> None:
        self.rows, self.refused = rows, 0

    def __call__(self, rows: int) -> None:
        if rows > self.rows:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.fixture
def allocator(answerer: Answerer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Allocator]:
    """The decoder's memory; it fails in the last layer, when the cache of the others has the token already."""
    found = Allocator(1 << 30)
    decoder: Any = answerer.lmm.decoder
    last = decoder.layers[-1]
    hook = last.register_forward_pre_hook(lambda _, inputs: found(len(inputs[0])))
    yield found
    hook.remove()


def answered(worker: Worker, asked: list[Question], longest: int = 6) -> list[list[Update]]:
    """What everybody is told until the batch is empty; the worker's turns are taken here."""
    told: list[list[Update]] = [[] for _ in asked]
    for one, updates in zip(asked, told, strict=True):
        worker.submit(Request(worker.answerer.tokenise(one), longest, updates.append))
    for _ in range(200):
        if not (worker._waiting or worker._rows()):
            return told
        worker._turn(worker._chosen())
    raise AssertionError("the batch does not come to its end")


def texts(told: list[list[Update]]) -> list[str]:
    return [updates[-1].text for updates in told]


def test_a_token_is_written_behind_the_others_without_a_copy_of_them(answerer: Answerer) -> None:
    batch = RunningBatch(answerer)
    batch.begin(answerer.route([question(0), question(1)]), [Running(n, 60) for n in range(2)])
    (layer, *_) = batch._state.cache.layers
    buffer, held = layer.keys.data_ptr(), batch.nbytes
    for _ in range(58):
        batch.step()
    assert batch.rows and (layer.keys.data_ptr(), batch.space.peak) == (buffer, held)


def test_rows_come_and_go_without_another_buffer(answerer: Answerer) -> None:
    batch = RunningBatch(answerer, slots=3)
    batch.begin(answerer.route([question(0)]), [Running(0, 60)])
    held = batch.nbytes
    batch.step()
    batch.begin(answerer.route([question(n) for n in (1, 2)]), [Running(n, 60) for n in (1, 2)])
    batch.drop({0})
    batch.begin(answerer.route([question(0)]), [Running(3, 60)])
    assert [row.key for row in batch.rows] == [2, 1, 3] and batch.space.peak == held
    batch.drop({1, 2, 3})
    batch.begin(answerer.route([question(n) for n in range(3)]), [Running(n, 60) for n in range(3)])
    assert batch.space.peak == held


def test_memory_for_the_whole_batch_is_allocated_as_far_as_it_is_allowed(answerer: Answerer) -> None:
    worker = Worker(answerer, 50, 60, memory=2 << 20)
    asked = [question(n % 3) for n in range(50)]
    expected = [answer.text for answer in answerer.answer(asked)]
    assert texts(answered(worker, asked)) == expected
    assert 3 < worker.largest < 50
    assert worker.running.nbytes > 0 and worker.running.space.peak <= 2 << 20


@pytest.mark.parametrize("rows", [pytest.param(1, marks=pytest.mark.slow), 2, 3, 5])
def test_answers_are_the_same_when_memory_runs_out_at_so_many_rows(
    answerer: Answerer, allocator: Allocator, rows: int
) -> None:
    expected = [answer.text for answer in answerer.answer(ASKED)]
    allocator.rows = rows
    assert texts(answered(Worker(answerer, 6, 8), ASKED)) == expected
    assert allocator.refused > 0


def test_memory_that_runs_out_in_the_middle_parks_half_and_loses_nothing(
    answerer: Answerer, allocator: Allocator
) -> None:
    expected = [answer.text for answer in answerer.answer(ASKED)]
    worker, told = Worker(answerer, 6, 8), [list[Update]() for _ in ASKED]
    for one, updates in zip(ASKED, told, strict=True):
        worker.submit(Request(answerer.tokenise(one), 6, updates.append))
    worker._turn(worker._chosen())
    assert len(worker.running.rows) == 6
    allocator.rows = 3  # another process took the rest
    worker._step()
    assert (len(worker.running.rows), [len(parked.rows) for parked in worker._parked]) == (3, [3])
    allocator.rows = 6
    while worker._rows():
        worker._turn(worker._chosen())
    assert texts(told) == expected
    assert all(update.error is None for updates in told for update in updates)


def test_a_request_that_never_fits_is_told_and_the_others_go_on(
    answerer: Answerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [answer.text for answer in answerer.answer(ASKED[:2])]
    worker = Worker(answerer, 6, 8)
    long = Question("task " + "b" * 150 + "?")
    decoder = type(answerer.lmm.decoder)
    forward = decoder.forward

    def limited(self: Any, *given: Any, **named: Any) -> Any:
        if named["inputs_embeds"].shape[1] > 150:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory")
        return forward(self, *given, **named)

    monkeypatch.setattr(decoder, "forward", limited)
    told = answered(worker, [ASKED[0], long, ASKED[1]])
    assert told[1][-1].finish == "too_large"
    assert [told[0][-1].text, told[2][-1].text] == expected


def test_out_of_memory_alone_in_the_middle_of_an_answer_is_told_and_the_worker_lives(
    answerer: Answerer, allocator: Allocator
) -> None:
    worker, updates = Worker(answerer, 2, 4), list[Update]()
    worker.submit(Request(answerer.tokenise(question(0)), 6, updates.append))
    worker._turn(worker._chosen())
    allocator.rows = 0
    worker._turn(worker._chosen())
    assert updates[-1].finish == "too_large" and not worker._rows()
    allocator.rows = 2
    assert texts(answered(worker, [question(1)])) == [answerer.answer([question(1)])[0].text]


def test_who_waits_is_let_in_as_memory_allows(answerer: Answerer) -> None:
    sizes = [Worker(answerer, 6, 8)._extent(Request(answerer.tokenise(one), 6, print)) for one in ASKED]
    memory = KeyValueMemory(answerer.lmm, 1)
    worker = Worker(answerer, 6, 8, memory.needed([], sizes[:2]))
    expected = [answer.text for answer in answerer.answer(ASKED)]
    assert texts(answered(worker, ASKED)) == expected
    assert 2 <= worker.largest < len(ASKED)
    unlimited = Worker(answerer, 6, 8)
    answered(unlimited, ASKED)
    assert unlimited.largest == len(ASKED)


def test_memory_of_earlier_rows_is_given_back_for_one_that_needs_it(answerer: Answerer) -> None:
    worker, long = Worker(answerer, 64, 8), Question("task " + "b" * 150 + "?")
    answered(worker, [question(0)])
    size = worker._extent(Request(answerer.tokenise(long), 6, print))
    worker.memory.limit = worker.memory.needed([], [size])
    assert worker.running.nbytes > worker.memory.limit
    (updates,) = answered(worker, [long])
    assert updates[-1].text == answerer.answer([long])[0].text
    assert 0 < worker.running.nbytes <= worker.memory.limit


def test_what_can_never_fit_is_told_before_anything_is_computed(answerer: Answerer) -> None:
    worker = Worker(answerer, 6, 8, memory=1)
    (updates,) = answered(worker, [question(0)])
    assert [update.finish for update in updates] == ["too_large"] and worker.batches == 0
    assert "take more memory than there is" in str(updates[0].error)


def test_memory_is_reckoned_for_the_longest_row_to_its_end(answerer: Answerer) -> None:
    memory = KeyValueMemory(answerer.lmm, 1 << 20)
    # Two layers, keys and values of two heads of 16 numbers, in float32.
    assert memory.token_bytes == 2 * 2 * 32 * 4
    running = [Extent(10, 5), Extent(20, 1)]
    needed, scores = 2 * (20 + 5) * memory.token_bytes, 2 * 2 * 4 * answerer.lmm.model.config.text_config.vocab_size
    assert memory.needed(running, []) == needed * 3 // 2 + scores  # while one of two layers is enlarged
    assert memory.needed(running, [], held=2 * needed) == 2 * needed + scores
    assert memory.most([], 0) == (1 << 20) * 2 // (memory.token_bytes * 3)
    waiting = [Extent(3, 2), Extent(1, 1), Extent(30, 9)]
    for number in range(3):
        memory.limit = memory.needed(running, waiting[:number])
        assert memory.admitted(running, waiting, 0) == number
        memory.limit -= 1
        assert memory.admitted(running, waiting, 0) == max(0, number - 1)
    memory.limit = memory.needed(running, []) + 1
    memory.ran_out()
    assert memory.limit < memory.needed(running, [])


def test_on_a_gpu_the_free_memory_is_asked_for(answerer: Answerer, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = KeyValueMemory(answerer.lmm)
    memory.device, memory.limit = torch.device("cuda"), None
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3000, 10000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 500)
    assert memory.room(held=400) == 400 + 3000 + 200 - 500
    memory.ran_out()
    assert memory.room(held=400) == 400 + 3000 + 200 - 1000


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_which_errors_mean_that_memory_ran_out(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


def test_the_thread_outlives_running_out(answerer: Answerer, allocator: Allocator) -> None:
    worker, done = Worker(answerer, 2, 4), threading.Event()
    worker.start()
    allocator.rows = 0

    def tell(update: Update) -> None:
        if update.finish is not None:
            done.set()

    worker.submit(Request(answerer.tokenise(question(0)), 6, tell))
    assert done.wait(30) and worker.alive
    worker.close()
