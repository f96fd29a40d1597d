"""All measurements that need a GPU, in one call of less than ten minutes: LLaVA-1.5-7B's shape in bfloat16.

One step of training with each switch for speed is among them, and torchtitan's published rates to compare with.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.backbones.clip import projected
from pipeline.backbones.decoding import Prompts, generate
from pipeline.backbones.lmm import LMM
from pipeline.bench import measure
from pipeline.bench.keys import make_clip
from pipeline.bench.operations import SHARED, TASKS, step_operations
from pipeline.bench.optimizer_step import RATE
from pipeline.bench.sizes import SIZES, Size, every_image, make_batch, make_lmm
from pipeline.bench.step import OurStep
from pipeline.bench.switches import EQUIVALENT, PUBLISHED, SWITCHES, measured
from pipeline.data.collate import Batch
from pipeline.files.atomic import write_json
from pipeline.prompts.embedding import embed_with_sets
from pipeline.prompts.learner import prompt_learner
from pipeline.prompts.model import LearnerOnLMM
from pipeline.prompts.routers.mean import similarity
from pipeline.prompts.rules.top_k import select_for_inference
from pipeline.ranks.world import init_world
from pipeline.training.deepspeed_config import DS_CONFIGS
from pipeline.training.engine import gather_layer_by_layer, start_deepspeed
from pipeline.training.normaliser import Normaliser

NEW_TOKENS = 64
POLICIES = ("none", "selective", "full")
LAYOUTS = {
    "after_bos": ("after_bos", 1),
    "after_image": ("after_image", 1),
    "after_image_shared": ("after_image", SHARED),
}
DEADLINE_S = 540.0
NOT_MEASURED = {"result": "not measured: the time was over"}


def bench_gpu(
    size_name: str = "7b",
    samples: int = 8,
    answers: int = 16,
    rounds: int = 5,
    device: str = "cuda",
    out: Path | None = None,
    deadline_s: float = DEADLINE_S,
) -> dict[str, Any]:
    """Measure steps in every layout and checkpointing policy, switches, answers, and steps under ZeRO-2 and ZeRO-3.

    Sections run in the order of importance. A failed section is reported and the others run; sections that could not
    end within `deadline_s` seconds are skipped. `out` is rewritten after each section.
    """
    size, model = SIZES[size_name], _Model(SIZES[size_name], device)
    rate = measure.peak_rate(device, "bfloat16")
    sections: list[tuple[str, str, Callable[[], dict[str, Any]]]] = []

    def add_step(layout: str, policy: str) -> None:
        work = partial(_step, model, size, samples, layout, policy, rounds, device, rate)
        sections.append(("steps", f"{layout}, checkpointing {policy}", work))

    def add_switch(name: str) -> None:
        sections.append(("switches", name, lambda: measured(name, model.get(), size, samples, rounds, device)))

    add_step("after_bos", POLICIES[0])
    add_switch(SWITCHES[0])
    sections.append(("answering", "all", partial(_answering, model, size, answers, rounds, device)))
    for name in SWITCHES[1:3]:
        add_switch(name)
    for stage in ("zero2", "zero3"):
        sections.append(("deepspeed", stage, partial(_deepspeed, model, size, samples, stage, rounds, device)))
    for name in SWITCHES[3:]:
        add_switch(name)
    for layout in LAYOUTS:
        for policy in POLICIES:
            if (layout, policy) != ("after_bos", POLICIES[0]):
                add_step(layout, policy)
    result: dict[str, Any] = {"size": size_name, "samples": samples, "answers": answers}
    result |= {"machine": measure.machine(device), "steps": {}, "switches": {}, "answering": {}, "deepspeed": {}}
    result |= {"torchtitan tokens/s/GPU": PUBLISHED, "of which a step of frozen weights is": EQUIVALENT}
    return _measured(result, sections, out, deadline_s)


def _measured(
    result: dict[str, Any],
    sections: list[tuple[str, str, Callable[[], dict[str, Any]]]],
    out: Path | None,
    deadline_s: float,
) -> dict[str, Any]:
    """Run the sections (kind, name, work) in turn while one as long as the longest so far fits into the time."""
    began, longest = time.monotonic(), 0.0
    for kind, name, work in sections:
        start = time.monotonic()
        if start - began + longest > deadline_s:
            result[kind][name] = dict(NOT_MEASURED)
        else:
            result[kind][name] = _or_why_not(work)
            longest = max(longest, time.monotonic() - start)
        measure.tell(f"{kind}, {name}: {json.dumps(result[kind][name])}")
        if out is not None:
            write_json(out, result)
    return result


def _or_why_not(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return work()
    except torch.OutOfMemoryError:
        return {"result": "out of memory"}
    except Exception as error:  # any error of a section is reported, and the other sections run
        return {"result": f"failed: {type(error).__name__}: {error}"}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class _Model:
    """The frozen model, made on first use."""

    def __init__(self, size: Size, device: str) -> None:
        self._size, self._device = size, device
        self._lmm: LMM | None = None

    def get(self) -> LMM:
        """The model, which stays available."""
        if self._lmm is None:
            self._lmm = make_lmm(self._size, self._device, "bfloat16")
        return self._lmm

    def take(self) -> LMM:
        """The model for a caller who changes it; the next call makes a new one."""
        lmm, self._lmm = self.get(), None
        return lmm


def _batch(size: Size, samples: int, per_image: int, device: str) -> Batch:
    batch = make_batch(size, samples, per_image, TASKS - 1).to(torch.device(device))
    return batch if per_image > 1 else every_image(batch)


def _sets(size: Size) -> Tensor:
    return torch.randn(TASKS, size.prompt_length, size.width, generator=torch.Generator().manual_seed(1)) * 0.02


def _step(
    model: _Model, size: Size, samples: int, layout: str, policy: str, rounds: int, device: str, rate: float | None
) -> dict[str, Any]:
    sets, (insertion, per_image) = _sets(size), LAYOUTS[layout]
    lmm = model.get()
    step = OurStep(lmm, size, sets[:-1], sets[-1], insertion)
    step.module.checkpointing = policy
    batch = _batch(size, samples, per_image, device)

    def held() -> dict[str, Any]:
        return {"frozen": [*lmm.parameters(), *lmm.buffers()], **step.held}

    found = measure.compare({"step": (lambda: step(batch), samples, held)}, rounds, device)["step"]
    tokens = samples * (batch.input_ids.shape[1] + size.k * size.prompt_length)
    rates = {"tokens_per_s": round(tokens / found.seconds, 1)}
    return found.to_json(rate, step_operations(size, samples, layout)) | rates


def _answering(model: _Model, size: Size, answers: int, rounds: int, device: str) -> dict[str, Any]:
    """Tokens per second without sets, with k of them, and with CLIP's towers and routing before; all of one length.

    Overhead is what either costs over the plain model. Decoding and resizing images is in none of them.
    """
    lmm = model.get()
    batch = every_image(make_batch(size, answers, 1, TASKS, answers=False)).to(torch.device(device))
    bank = _sets(size).to(device, lmm.dtype)
    clip = make_clip(size).to(device)
    prototypes = torch.randn(TASKS, size.key_width, generator=torch.Generator().manual_seed(4))
    questions = batch.input_ids[:, -size.question_tokens :] % clip.config.text_config.vocab_size

    @torch.no_grad()
    def answer(sets: Tensor, asked: Batch) -> None:
        embeddings, attention, places = embed_with_sets(lmm, asked, sets, "after_bos")
        tokens = generate(lmm, Prompts(embeddings, attention, places, asked.images), NEW_TOKENS, NEW_TOKENS)
        assert all(len(row) == NEW_TOKENS for row in tokens)

    @torch.no_grad()
    def routed() -> None:
        image = projected(clip.get_image_features(pixel_values=batch.images["pixel_values"])).cpu()
        text = projected(clip.get_text_features(input_ids=questions)).cpu()
        selected = select_for_inference(similarity(image, text, prototypes), size.k)
        answer(bank, replace(batch, selected=selected.to(device)))

    calls: dict[str, Any] = {
        "plain": (lambda: answer(bank[:0], batch), answers, dict),
        "with sets": (lambda: answer(bank, batch), answers, dict),
        "with sets and keys": (routed, answers, dict),
    }
    found = measure.compare(calls, rounds, device)
    return {
        name: {
            "tokens_per_s": round(answers * NEW_TOKENS / value.seconds, 1),
            "overhead": round(1 / measure.ratio(found["plain"], value)["wall_clock"] - 1, 4),
        }
        for name, value in found.items()
    }


def _deepspeed(model: _Model, size: Size, samples: int, stage: str, rounds: int, device: str) -> dict[str, Any]:
    """The step in a DeepSpeed engine on one GPU; ZeRO-3 partitions the model's weights."""
    init_world()
    deepspeed = start_deepspeed()
    config = json.loads((DS_CONFIGS / f"{stage}.json").read_text("utf-8"))
    lmm = model.take() if stage == "zero3" else model.get()
    config |= {
        "train_micro_batch_size_per_gpu": samples,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": lmm.dtype == torch.bfloat16},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    sets = _sets(size)
    module = LearnerOnLMM(lmm, prompt_learner(lmm, size.prompt_length, size.key_width)).to(device)
    module.learner.start_stage({"prompt": sets[:-1]})
    module.learner["module"].prompt.data.copy_(sets[-1])
    if stage == "zero3":
        gather_layer_by_layer(module)
    trained = list(module.learner.trainables().values())
    engine = deepspeed.initialize(
        model=module, optimizer=torch.optim.AdamW(trained, lr=RATE), config=config, dist_init_required=False
    )[0]
    try:
        batch = _batch(size, samples, 1, device)
        normaliser = Normaliser(*batch.counts())

        def step() -> None:
            loss, _ = engine(batch, normaliser)
            engine.backward(loss)
            engine.step()

        step()
        peak = measure.peak_bytes(step, None, device)
        times = sorted(measure.seconds(step, device) for _ in range(rounds))
    finally:
        engine.destroy()
    middle = times[len(times) // 2]
    return {
        "seconds": round(middle, 4),
        "samples_per_s": round(samples / middle, 3),
        "peak_mib": round(peak / measure.MIB, 1),
    }
