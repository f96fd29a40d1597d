"""Everything that only a GPU can tell, in one call of under ten minutes: LLaVA-1.5-7B's shape in bfloat16."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipeline.backbones.lmm import LMM
from pipeline.bench import measure
from pipeline.bench.sizes import SIZES, Size, every_image, make_batch, make_lmm
from pipeline.bench.step import RATE, SHARED, TASKS, OurStep
from pipeline.config import PROJECT
from pipeline.data.collate import Batch
from pipeline.distributed import init_world
from pipeline.engine import gather_layer_by_layer, start_deepspeed
from pipeline.evaluate import generate_once
from pipeline.prompts.model import Normaliser, PromptedLMM

NEW_TOKENS = 64
POLICIES = ("none", "selective", "full")
OUT_OF_MEMORY = {"result": "out of memory"}


def bench_gpu(
    size_name: str = "7b", samples: int = 8, answers: int = 16, rounds: int = 5, device: str = "cuda"
) -> dict[str, Any]:
    """Training steps in every layout and with every policy of checkpointing, answers with sets and without, and the
    step under ZeRO-2 and ZeRO-3 on one GPU. What does not fit says so."""
    size, dtype = SIZES[size_name], "bfloat16"
    lmm = make_lmm(size, device, dtype)
    rate = measure.peak_rate(device, dtype)
    result: dict[str, Any] = {"size": size_name, "samples": samples, "answers": answers,
                              "machine": measure.machine(device), "steps": {}, "deepspeed": {}}  # fmt: skip
    for insertion, per_image in (("after_bos", 1), ("after_image", 1), ("after_image", SHARED)):
        for policy in POLICIES:
            name = f"{insertion}, {per_image} per image, checkpointing {policy}"
            work = partial(_step, lmm, size, samples, insertion, per_image, policy, rounds, device, rate)
            result["steps"][name] = _fits(work)
    result["answering"] = _fits(partial(_answering, lmm, size, answers, rounds, device))
    for stage in ("zero2", "zero3"):
        result["deepspeed"][stage] = _fits(partial(_deepspeed, lmm, size, samples, stage, rounds, device))
    return result


def _fits(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return work()
    except torch.OutOfMemoryError:
        return dict(OUT_OF_MEMORY)
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _batch(size: Size, samples: int, per_image: int, device: str) -> Batch:
    return make_batch(size, samples, per_image, TASKS - 1).to(torch.device(device))


def _sets(size: Size) -> Tensor:
    return torch.randn(TASKS, size.prompt_length, size.width, generator=torch.Generator().manual_seed(1)) * 0.02


def _step(
    lmm: LMM, size: Size, samples: int, insertion: str, per_image: int, policy: str, rounds: int, device: str,
    rate: float | None,
) -> dict[str, Any]:  # fmt: skip
    sets = _sets(size)
    step = OurStep(lmm, size, sets[:-1], sets[-1], insertion)
    step.module.checkpointing = policy
    batch = _batch(size, samples, per_image, device)
    if insertion == "after_bos":
        batch = every_image(batch)
    found = measure.compare({"step": (lambda: step(batch), samples, dict)}, rounds, device)["step"]
    return found.to_json(rate)


def _answering(lmm: LMM, size: Size, answers: int, rounds: int, device: str) -> dict[str, Any]:
    """Tokens per second with three sets and without any; the overhead is the method's whole cost at inference."""
    batch = every_image(make_batch(size, answers, 1, TASKS, answers=False)).to(torch.device(device))
    bank = _sets(size).to(device, lmm.dtype)
    lmm.model.generation_config.eos_token_id = None
    calls: dict[str, Any] = {
        "plain": (lambda: generate_once(lmm, batch, bank[:0], NEW_TOKENS, "after_bos"), answers, dict),
        "with sets": (lambda: generate_once(lmm, batch, bank, NEW_TOKENS, "after_bos"), answers, dict),
    }
    found = measure.compare(calls, rounds, device)
    speeds = {name: round(answers * NEW_TOKENS / value.seconds, 1) for name, value in found.items()}
    overhead = 1 / measure.ratio(found["plain"], found["with sets"])["wall_clock"] - 1
    return {"tokens_per_s": speeds, "overhead": round(overhead, 4)}


def _deepspeed(lmm: LMM, size: Size, samples: int, stage: str, rounds: int, device: str) -> dict[str, Any]:
    """The step inside a DeepSpeed engine on one GPU; the weights of `lmm` go into it."""
    init_world()
    deepspeed = start_deepspeed()
    config = json.loads((PROJECT / "ds_configs" / f"{stage}.json").read_text("utf-8"))
    config |= {
        "train_micro_batch_size_per_gpu": samples, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0,
        "bf16": {"enabled": lmm.dtype == torch.bfloat16}, "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip
    sets = _sets(size)
    module = PromptedLMM(lmm, size.prompt_length, size.key_width).to(device)
    module.start_stage(sets[:-1], 1.0)
    module.prompt.data.copy_(sets[-1])
    if stage == "zero3":
        gather_layer_by_layer(module)
    trained = [module.prompt, *module.head.parameters()]
    engine = deepspeed.initialize(
        model=module, optimizer=torch.optim.AdamW(trained, lr=RATE), config=config, dist_init_required=False
    )[0]
    batch = every_image(_batch(size, samples, 1, device))
    normaliser = Normaliser(*batch.counts())

    def step() -> None:
        loss, _ = engine(batch, normaliser)
        engine.backward(loss)
        engine.step()

    step()
    peak = measure.peak_bytes(step, {}, device)
    times = sorted(measure.seconds(step, device) for _ in range(rounds))
    engine.destroy()
    return {"seconds": round(times[len(times) // 2], 4), "samples_per_s": round(samples / times[len(times) // 2], 3),
            "peak_mib": round(peak / measure.MIB, 1)}  # fmt: skip
