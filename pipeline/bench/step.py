"""One training step: ours in its layouts, the official implementation's, and Hugging Face PEFT's prompt tuning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipeline.backbones.lmm import DTYPES, LMM
from pipeline.backbones.prompt_schedule import LayerSchedule, replaced
from pipeline.bench import measure
from pipeline.bench.measure import Measured
from pipeline.bench.operations import PARTS, SHARED, TASKS, VARIANTS, step_operations
from pipeline.bench.optimizer_step import OptimizerStep
from pipeline.bench.reference import ReferenceStep, Towers
from pipeline.bench.sizes import SIZES, Size, every_image, make_batch, make_lmm
from pipeline.data.collate import Batch
from pipeline.data.conversation import KEPT
from pipeline.errors import UserError
from pipeline.prompts.learner import Learner, prompt_learner
from pipeline.prompts.model import LearnerOnLMM
from pipeline.prompts.parts.base import Part
from pipeline.prompts.parts.deep_rows import DeepRows
from pipeline.prompts.parts.prefix import PrefixRows
from pipeline.training.normaliser import Normaliser


class LearnerStep(OptimizerStep):
    """Steps of `LearnerOnLMM` on a learner beside the modules of earlier tasks, the `bank`; returns the loss terms."""

    def __init__(self, lmm: LMM, learner: Learner, bank: Mapping[str, Tensor]) -> None:
        self.module = LearnerOnLMM(lmm, learner)
        self.module.to(lmm.model.device)
        learner.start_stage(bank)
        super().__init__(learner.trainables().values())

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        loss, terms = self.module(batch, Normaliser(*batch.counts()))
        return loss, torch.stack([*terms.values()])

    @property
    def held(self) -> dict[str, Any]:
        """Tensors that live from step to step."""
        return {**super().held, "bank": list(self.module.learner.bank.values())}


class OurStep(LearnerStep):
    """The step of this project's method: a prompt and its head, beside the sets of earlier tasks."""

    def __init__(self, lmm: LMM, size: Size, bank: Tensor, prompt: Tensor, insertion: str) -> None:
        learner = prompt_learner(lmm, size.prompt_length, size.key_width, insertion)
        learner["module"].prompt.data.copy_(prompt)
        super().__init__(lmm, learner, {"prompt": bank})


class PartStep(LearnerStep):
    """The same of another part in every layer, with random modules [T - 1, ...] of earlier tasks; without a head."""

    def __init__(self, lmm: LMM, size: Size, name: str) -> None:
        length = size.prompt_length
        rows = LayerSchedule(tuple(replaced(length, size.layers)))
        part: Part = DeepRows(lmm, rows) if name == "deep" else PrefixRows(lmm, length)
        generator, bank = torch.Generator().manual_seed(1), {}
        for key, value in part.trainables().items():
            made = torch.randn(TASKS, *value.shape, generator=generator) * 0.02
            value.data.copy_(made[-1])
            bank[key] = made[:-1]
        super().__init__(lmm, Learner({"module": part}), bank)


class PeftStep(OptimizerStep):
    """Hugging Face PEFT's prompt tuning, unmodified, with the same number of soft tokens before the input."""

    def __init__(self, lmm: LMM, size: Size) -> None:
        try:
            from peft import PromptTuningConfig, TaskType, get_peft_model
        except ImportError:
            raise UserError("The variant peft needs the package peft; install requirements-dev.txt.") from None
        settings = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=size.k * size.prompt_length)
        self.model = get_peft_model(lmm.model, settings)
        super().__init__(value for value in self.model.parameters() if value.requires_grad)

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        loss = self.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention,
            labels=batch.labels,
            pixel_values=batch.images["pixel_values"],
        ).loss
        return loss, loss


def bench_step(
    size_name: str,
    samples: int = 4,
    rounds: int = 3,
    variants: tuple[str, ...] = VARIANTS,
    device: str = "cpu",
    dtype: str = "float32",
    layers: int | None = None,
) -> dict[str, Any]:
    """Measure the variants on the same weights and samples; ratios are relative to `reference` and `peft`.

    Every sample has its own image, except in after_image_shared, where `SHARED` samples share one; in after_bos_kept
    the vision tower's features are precomputed. Raises UserError for an unknown variant.
    """
    unknown = sorted({*variants} - {*VARIANTS, *PARTS})
    if unknown:
        raise UserError(f"No variant {', '.join(unknown)}; expected some of {', '.join((*VARIANTS, *PARTS))}.")
    size = SIZES[size_name]
    size = replace(size, layers=layers or size.layers)
    lmm = make_lmm(size, device, dtype)
    generator = torch.Generator().manual_seed(1)
    sets = torch.randn(TASKS, size.prompt_length, size.width, generator=generator) * 0.02
    bank, prompt = sets[:-1], sets[-1]
    own, shared = (
        make_batch(size, samples, per_image, TASKS - 1).to(torch.device(device)) for per_image in (1, SHARED)
    )
    single = every_image(own)
    towers = Towers(size, device, DTYPES[dtype]) if "reference" in variants else None
    steps: dict[str, tuple[Callable[[Batch], Tensor], Batch]] = {}
    for name in variants:
        if name == "reference":
            assert towers is not None
            steps[name] = ReferenceStep(lmm, size, bank, prompt, towers), single
        elif name == "peft":
            steps[name] = PeftStep(lmm, size), single
        elif name in PARTS:
            steps[name] = PartStep(lmm, size, name), single
        elif name.startswith("after_bos"):
            given = with_kept_features(lmm, single) if name.endswith("kept") else single
            steps[name] = OurStep(lmm, size, bank, prompt, "after_bos"), given
        else:
            steps[name] = OurStep(lmm, size, bank, prompt, "after_image"), shared if name.endswith("shared") else own
    words = lmm.model.get_input_embeddings().weight
    without_words = [value for value in [*lmm.parameters(), *lmm.buffers()] if value is not words]
    # The reference trains its own table in place of the model's embeddings, and has a text tower.
    towered = [*without_words, *(towers.words.parameters() if towers is not None else ())]
    frozen = {name: towered if name == "reference" else [*without_words, words] for name in steps}
    result: dict[str, Any] = {"agreement": _agreement(steps)}
    measured = measure.compare(
        {
            name: (partial(step, batch), samples, partial(_held, step, frozen[name]))
            for name, (step, batch) in steps.items()
        },
        rounds,
        device,
    )
    rate = measure.peak_rate(device, dtype)
    # Prompts of every layer are compared with those at the input too.
    against_these = ("reference", "peft", *(["after_bos"] if {*PARTS} & {*variants} else []))
    return result | {
        "size": size_name,
        "dtype": dtype,
        "parameters": sum(value.numel() for value in lmm.parameters()),
        "samples": samples,
        "tokens": int(own.input_ids.shape[1]) + size.k * size.prompt_length,
        "rounds": rounds,
        "machine": measure.machine(device),
        "variants": {name: value.to_json(rate, _needed(size, name, value)) for name, value in measured.items()},
        "ratios": {against: _ratios(measured, against) for against in against_these if against in measured},
    }


def with_kept_features(lmm: LMM, batch: Batch) -> Batch:
    """The batch with precomputed vision features, as with `train.vision_features: kept`."""
    return replace(batch, images={KEPT: lmm.tower_features(batch.images).half()})


def _needed(size: Size, name: str, measured: Measured) -> int:
    """Operations of a step without recomputation, which only the reference has."""
    if name != "reference":
        return measured.operations
    return step_operations(size, measured.samples, name, recomputed=False)


def _held(step: Any, frozen: list[Tensor]) -> dict[str, Any]:
    return {"frozen": frozen, **step.held}


def _ratios(measured: dict[str, Measured], against: str) -> dict[str, dict[str, float]]:
    ours = [name for name in measured if name.startswith("after_") or name in PARTS]
    return {name: measure.ratio(measured[against], measured[name]) for name in ours}


def _agreement(steps: dict[str, Any]) -> dict[str, float]:
    """The first loss of `reference` and of this project in the same layout, which have to be equal."""
    if not {"reference", "after_bos"} <= steps.keys():
        return {}
    (reference, batch), (ours, _) = steps["reference"], steps["after_bos"]
    ours.module.learner["head"].load_state_dict(reference.heads[-1].state_dict())
    with torch.no_grad():
        expected = reference.terms(batch)
        found = torch.stack([*ours.module(batch, Normaliser(*batch.counts()))[1].values()])
    return {
        "reference": round(float(expected[0]), 6),
        "after_bos": round(float(found[0]), 6),
        "difference": float((expected - found).abs().max()),
    }
