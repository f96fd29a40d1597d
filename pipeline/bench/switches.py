"""The switches for speed, each against the same without: compiled layers, attention, packing, graphs, few bits.

One file because each switch is a few lines here, and all share the step and the way it is measured.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from pipeline.backbones.compiled import Compiled, counted_compilations, require_compiler
from pipeline.backbones.decoding import GreedyDecoder, Prompts, Row, generate
from pipeline.backbones.lmm import LMM
from pipeline.backbones.precision import has_tf32
from pipeline.backbones.quantised import QuantisedLinear, quantise
from pipeline.backbones.static_decoding import StaticDecoder
from pipeline.bench import measure
from pipeline.bench.operations import TASKS
from pipeline.bench.sizes import IMAGE_TOKEN, SIZES, Size, every_image, make_batch, make_lmm
from pipeline.bench.step import OurStep
from pipeline.data.collate import Batch
from pipeline.errors import UserError
from pipeline.prompts.embedding import embed_with_sets
from pipeline.training.copying import on_device

# Tokens per second and GPU of full fine-tuning of Llama-3.1-8B on 8 H100 with FSDP: torchtitan, benchmarks/ at b5bcd76.
PUBLISHED = {"bfloat16": 5762, "bfloat16, compiled": 6667, "float8, compiled": 8532}
# What the compiled rate is on a step whose weights are frozen, which takes 4 operations per weight and token instead of
# 6 and the output layer at answers only (docs/scaling.md), and the rate at 55 % of a H100's peak.
EQUIVALENT = {"the same use of the GPU": 12_400, "55 % of its peak": 21_000}
SWITCHES = (
    *("compile", "static_cache", "packing", "flash", "flash_packing"),
    *("compile_tower", "copy_ahead", "tf32", "int8", "nf4"),
)
FLASH = "flash_attention_2"
NEW_TOKENS = 32  # of an answer
COPIED = 4  # steps of a call, so that there is a step to copy behind


@dataclass(frozen=True)
class Case:
    """A step, or answers, with a switch and the same without it."""

    plain: Callable[[], Any]
    switched: Callable[[], Any]
    samples: int
    tokens: int  # of a call, padding not counted
    held: Callable[[], dict[str, Any]] = dict
    held_switched: Callable[[], dict[str, Any]] | None = None  # where the switch holds other tensors
    note: Callable[[], dict[str, Any]] = dict  # more to tell of it, after its calls


def bench_switches(
    size_name: str,
    samples: int = 8,
    rounds: int = 3,
    switches: tuple[str, ...] = SWITCHES,
    device: str = "cpu",
    dtype: str = "float32",
) -> dict[str, Any]:
    """Measure each switch in turn; a ratio above 1 is a gain. UserError for an unknown switch."""
    unknown = sorted({*switches} - {*SWITCHES})
    if unknown:
        raise UserError(f"No switch {', '.join(unknown)}; expected some of {', '.join(SWITCHES)}.")
    size = SIZES[size_name]
    lmm = make_lmm(size, device, dtype)
    found: dict[str, Any] = {"size": size_name, "dtype": dtype, "samples": samples, "machine": measure.machine(device)}
    rows = {name: measured(name, lmm, size, samples, rounds, device) for name in switches}
    return found | {
        "variants": {name: row for name, row in rows.items() if "seconds" in row},
        "not measured": {name: row["result"] for name, row in rows.items() if "seconds" not in row},
        "torchtitan tokens/s/GPU": PUBLISHED,
        "of which a step of frozen weights is": EQUIVALENT,
    }


def measured(name: str, lmm: LMM, size: Size, samples: int, rounds: int, device: str) -> dict[str, Any]:
    """One switch: seconds without and with it, tokens per second, the ratios, and what there is to tell of it."""
    case = CASES[name](lmm, size, samples, device)
    if isinstance(case, str):
        return {"result": case}
    began = time.perf_counter()
    case.switched()
    first = time.perf_counter() - began
    held = case.held_switched or case.held
    calls = {"plain": (case.plain, case.samples, case.held), "switched": (case.switched, case.samples, held)}
    both = measure.compare(calls, rounds, device)
    ratios = measure.ratio(both["plain"], both["switched"])
    return {
        "plain_s": round(both["plain"].seconds, 4),
        "seconds": round(both["switched"].seconds, 4),
        "tokens_per_s": round(case.tokens / both["switched"].seconds, 1),
        "gain": ratios["wall_clock"],
        "of processor time": ratios["processor_time"],
        # Of a graph that is replayed nothing is counted.
        "operations": "-" if name == "static_cache" and device != "cpu" else ratios["operations"],
        "peak_memory": ratios["peak_memory"],
        "first_s": round(first, 2),
        "note": ", ".join(f"{key} {value}" for key, value in case.note().items()) or "-",
    }


def mixed_batch(size: Size, samples: int, seed: int = 0) -> Batch:
    """A batch on the CPU of which every second sample has no image, padded as for training."""
    batch = every_image(make_batch(size, samples, 1, TASKS - 1, seed))
    pictured = torch.arange(samples) % 2 == 0
    width = batch.input_ids.shape[1]
    values: dict[str, Tensor] = {}
    for name, filler in (("input_ids", 0), ("attention", 0), ("labels", -100)):
        rows = []
        for row, ids, picture in zip(getattr(batch, name), batch.input_ids, pictured, strict=True):
            kept = row if picture else row[ids != IMAGE_TOKEN]
            rows.append(pad(kept, (0, width - len(kept)), value=filler))
        values[name] = torch.stack(rows)
    images = {name: value[pictured] for name, value in batch.images.items()}
    return replace(batch, **values, images=images, has_image=pictured)  # type: ignore[arg-type]


def _step(lmm: LMM, size: Size) -> OurStep:
    sets = torch.randn(TASKS, size.prompt_length, size.width, generator=torch.Generator().manual_seed(1)) * 0.02
    return OurStep(lmm, size, sets[:-1], sets[-1], "after_bos")


def _tokens(batch: Batch, size: Size) -> int:
    return int(batch.attention.sum()) + len(batch.ids) * size.k * size.prompt_length


def _batch(size: Size, samples: int, device: str) -> Batch:
    return every_image(make_batch(size, samples, 1, TASKS - 1)).to(torch.device(device))


def _pair(lmm: LMM, plain: OurStep, switched: OurStep, batch: Batch, size: Size) -> Case:
    """Two steps, each of a frozen model of its own or both of `lmm`."""

    def held(model: LMM) -> dict[str, Any]:
        return {"frozen": [*model.parameters(), *model.buffers()], "plain": plain.held, "switched": switched.held}

    samples, tokens, calls = len(batch.ids), _tokens(batch, size), (partial(plain, batch), partial(switched, batch))
    return Case(*calls, samples, tokens, partial(held, lmm), partial(held, switched.module.lmm))


def _compiled(lmm: LMM, size: Size, samples: int, device: str, tower: bool = False) -> Case | str:
    try:
        require_compiler(torch.device(device))
    except UserError as error:
        return str(error)
    before = counted_compilations()
    plain, switched = _step(lmm, size), _step(lmm, size)
    switched.module.compiled = Compiled(lmm, tower)
    case = _pair(lmm, plain, switched, _batch(size, samples, device), size)
    return replace(case, note=lambda: {"compilations": counted_compilations() - before})


def _packed(lmm: LMM, size: Size, samples: int, device: str) -> Case:
    plain, switched = _step(lmm, size), _step(lmm, size)
    switched.module.packing = True
    case = _pair(lmm, plain, switched, mixed_batch(size, samples).to(torch.device(device)), size)
    return replace(case, note=lambda: {"fill": switched.module.fill})


def why_no_flash(dtype: torch.dtype, device: str) -> str:
    """Why FlashAttention 2 cannot compute numbers of this type on a device; "" where it can."""
    if device == "cpu" or importlib.util.find_spec("flash_attn") is None:
        return "FlashAttention 2 needs a GPU and the package flash-attn"
    return "FlashAttention 2 needs bfloat16" if dtype == torch.float32 else ""


def _flash(lmm: LMM, size: Size, samples: int, device: str, packed: bool = False) -> Case | str:
    """With FlashAttention 2 against sdpa; `packed`: samples behind each other against padded ones, both with it."""
    obstacle = why_no_flash(lmm.dtype, device)
    if obstacle:
        return obstacle
    plain, switched = _step(lmm, size), _step(lmm, size)
    switched.module.packing = packed
    batch = mixed_batch(size, samples).to(torch.device(device)) if packed else _batch(size, samples, device)
    case = _pair(lmm, plain, switched, batch, size)

    def call(step: Callable[[], Any], implementation: str) -> None:
        with _attending(lmm, implementation):
            step()

    calls = (partial(call, case.plain, FLASH if packed else "sdpa"), partial(call, case.switched, FLASH))
    note = (lambda: {"fill": switched.module.fill}) if packed else dict
    return replace(case, plain=calls[0], switched=calls[1], note=note)


@contextlib.contextmanager
def _attending(lmm: LMM, implementation: str) -> Iterator[None]:
    """While the block runs, the decoder attends by this implementation."""
    config: Any = lmm.decoder.config
    before, config._attn_implementation = config._attn_implementation, implementation
    try:
        yield
    finally:
        config._attn_implementation = before


def _copied(lmm: LMM, size: Size, samples: int, device: str) -> Case | str:
    if device == "cpu":
        return "there is nothing to copy on a CPU"
    step, batch = _step(lmm, size), every_image(make_batch(size, samples, 1, TASKS - 1))

    def steps(ahead: bool) -> Iterator[list[Any]]:
        return iter([[batch.pin_memory() if ahead else batch] for _ in range(COPIED)])

    def call(ahead: bool) -> None:
        for (ready,) in on_device(steps(ahead), torch.device(device), ahead):
            step(ready)

    return Case(partial(call, False), partial(call, True), COPIED * samples, COPIED * _tokens(batch, size))


def _static(lmm: LMM, size: Size, samples: int, device: str) -> Case:
    batch = every_image(make_batch(size, samples, 1, TASKS, answers=False)).to(torch.device(device))
    sets = torch.randn(TASKS, size.prompt_length, size.width, generator=torch.Generator().manual_seed(1)) * 0.02
    bank = sets.to(device, lmm.dtype)

    @torch.no_grad()
    def answer(decoder: type[GreedyDecoder[Row]]) -> None:
        embeddings, attention, places = embed_with_sets(lmm, batch, bank, "after_bos")
        prompts = Prompts(embeddings, attention, places, batch.images)
        generate(lmm, prompts, NEW_TOKENS, NEW_TOKENS, decoder=decoder)

    calls = (partial(answer, GreedyDecoder[Row]), partial(answer, StaticDecoder[Row]))
    return Case(*calls, samples, samples * NEW_TOKENS)


def _tf32(lmm: LMM, size: Size, samples: int, device: str) -> Case | str:
    if not has_tf32(torch.device(device)):
        return "TensorFloat-32 needs a GPU of compute capability 8.0 or newer"
    if lmm.dtype != torch.float32:
        size = SIZES["1b"]
        lmm = make_lmm(size, device, "float32")
    step, batch = _step(lmm, size), _batch(size, samples, device)

    def call() -> None:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            step(batch)
        finally:
            torch.set_float32_matmul_precision(before)

    return Case(partial(step, batch), call, samples, _tokens(batch, size))


def _quantised(lmm: LMM, size: Size, samples: int, device: str, kind: str) -> Case:
    few = copy.deepcopy(lmm)
    for name, layer in list(few.decoder.named_modules()):
        if isinstance(layer, nn.Linear):
            made = QuantisedLinear(layer.in_features, layer.out_features, None, kind)
            weight, scales = quantise(layer.weight, kind)
            made.weight, made.scales = nn.Parameter(weight, False), nn.Parameter(scales, False)
            parent, _, last = name.rpartition(".")
            setattr(few.decoder.get_submodule(parent), last, made)
    plain, switched = _step(lmm, size), _step(few, size)
    case = _pair(lmm, plain, switched, _batch(size, samples, device), size)
    sizes = [sum(value.nbytes for value in model.decoder.parameters()) for model in (lmm, few)]
    return replace(case, note=lambda: {"decoder's weights": f"{sizes[0] / sizes[1]:.2f} times smaller"})


CASES: dict[str, Callable[[LMM, Size, int, str], Case | str]] = {
    "compile": _compiled,
    "static_cache": _static,
    "compile_tower": partial(_compiled, tower=True),
    "packing": _packed,
    "flash": _flash,
    "flash_packing": partial(_flash, packed=True),
    "copy_ahead": _copied,
    "tf32": _tf32,
    "int8": partial(_quantised, kind="int8"),
    "nf4": partial(_quantised, kind="nf4"),
}
