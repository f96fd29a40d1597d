"""The method against numbers recorded from the reference implementation (`--fixtures DIR`, folder modalprompt/)."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.backbones.lmm import LMM
from pipeline.data.collate import Batch
from pipeline.prompts.insertion import gather_sets, insert_prompts
from pipeline.prompts.model import Normaliser, PromptedLMM
from pipeline.prompts.routing import select_for_inference, select_for_training, similarity

IMAGE_MARK = -200  # one place in the recorded ids stands for all image tokens
HEAD = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest) -> Path:
    root = request.config.getoption("--fixtures")
    if not root or not (Path(root) / "modalprompt").is_dir():
        pytest.skip("no recorded results: give --fixtures DIR with a folder modalprompt/")
    return Path(root) / "modalprompt"


@pytest.fixture(scope="module")
def module(folder: Path) -> PromptedLMM:
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder / "llava_tiny", dtype=torch.float32)
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=model.config.text_config.eos_token_id)
    meta = read_meta(folder)
    return PromptedLMM(LMM(model, SimpleNamespace(tokenizer=tokenizer)), meta["prompt_length"], meta["key_dim"])


@pytest.fixture(scope="module")
def inputs(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "inputs.safetensors")


def read_meta(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "meta.json").read_text())


def stages(folder: Path, kind: str) -> dict[int, dict[str, Tensor]]:
    found = {int(path.stem.removeprefix(kind)): load_file(path) for path in sorted(folder.glob(f"{kind}*.safetensors"))}
    assert found, f"{folder} holds no {kind}*.safetensors"
    return found


def expand(module: PromptedLMM, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """One sample with its image mark replaced by the image tokens of our models."""
    config = module.lmm.model.config
    count = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    place = int((ids == IMAGE_MARK).nonzero()[0, 0])
    image, unlabelled = ids.new_full((count,), module.lmm.image_token), labels.new_full((count,), -100)
    return (
        torch.cat([ids[:place], image, ids[place + 1 :]]),
        torch.cat([labels[:place], unlabelled, labels[place + 1 :]]),
    )


def batch_of(module: PromptedLMM, inputs: dict[str, Tensor], selected: Tensor) -> Batch:
    rows = [
        expand(module, ids[mask.bool()], labels[mask.bool()])
        for ids, labels, mask in zip(inputs["input_ids"], inputs["labels"], inputs["attention_mask"], strict=True)
    ]
    pad = torch.nn.utils.rnn.pad_sequence
    count = len(rows)
    return Batch(
        input_ids=pad([ids for ids, _ in rows], batch_first=True),
        attention=pad([torch.ones_like(ids) for ids, _ in rows], batch_first=True),
        labels=pad([labels for _, labels in rows], batch_first=True, padding_value=-100),
        pixel_values=inputs["pixel_values"],
        has_image=torch.ones(count, dtype=torch.bool),
        weights=torch.ones(count),
        selected=selected,
        image_key=inputs["image_key"],
        text_key=inputs["text_key"],
        ids=[str(number) for number in range(count)],
    )


def load_head(module: PromptedLMM, recorded: dict[str, Tensor], task: int) -> None:
    module.head.load_state_dict({name: recorded[f"head.{name}"][task].clone() for name in HEAD})


@torch.no_grad()
def prototypes(module: PromptedLMM, recorded: dict[str, Tensor], count: int) -> Tensor:
    rows = []
    for task in range(count):
        load_head(module, recorded, task)
        rows.append(module.head(recorded["prompts"][task]))
    return torch.stack(rows) if rows else torch.zeros(0, module.head.fc2.out_features)


def start(module: PromptedLMM, inputs: dict[str, Tensor], recorded: dict[str, Tensor], task: int) -> Batch:
    """Set up training of task `task` (1-based) and return the recorded batch with our selection."""
    scores = similarity(inputs["image_key"], inputs["text_key"], prototypes(module, recorded, task - 1))
    if "similarity_previous" in recorded:
        torch.testing.assert_close(scores, recorded["similarity_previous"], atol=2e-6, rtol=0)
    selected = select_for_training(scores, k=3)
    if "top_previous" in recorded:
        assert torch.equal(selected, recorded["top_previous"].flip(1))
    load_head(module, recorded, task - 1)
    module.prompt.data.copy_(recorded["prompts"][task - 1])
    module.start_stage(recorded["prompts"][: task - 1], 1.0)
    return batch_of(module, inputs, selected)


def step(module: PromptedLMM, batch: Batch) -> Tensor:
    module.zero_grad()
    loss, terms = module(batch, Normaliser(*batch.counts()))
    loss.backward()
    return terms


def assert_gradient(found: Tensor | None, expected: Tensor) -> None:
    assert found is not None
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max() + 1e-12


def test_training_losses_gradients_and_selection(folder: Path, module: PromptedLMM, inputs: dict[str, Tensor]) -> None:
    for task, recorded in stages(folder, "train_task").items():
        terms = step(module, start(module, inputs, recorded, task))
        expected = torch.stack([recorded[f"loss_{name}"].reshape(()) for name in ("lm", "image", "text")])
        torch.testing.assert_close(terms, expected, atol=2e-6, rtol=0)
        assert_gradient(module.prompt.grad, recorded["grad.prompt"])
        for name, parameter in module.head.named_parameters():
            assert_gradient(parameter.grad, recorded[f"grad.head.{name}"])


def test_answer_logits(folder: Path, module: PromptedLMM, inputs: dict[str, Tensor], monkeypatch: Any) -> None:
    seen: list[Tensor] = []
    original = LMM.logits

    def watched(self: LMM, hidden: Tensor) -> Tensor:
        seen.append(original(self, hidden))
        return seen[-1]

    monkeypatch.setattr(LMM, "logits", watched)
    for task, recorded in stages(folder, "train_task").items():
        seen.clear()
        batch = start(module, inputs, recorded, task)
        with torch.no_grad():
            module(batch, Normaliser(1.0, 1.0))
        expected = [recorded[f"answer_logits.{number}"] for number in range(len(batch.ids))]
        torch.testing.assert_close(seen[0], torch.cat(expected), atol=1e-5, rtol=0)


def test_three_optimizer_steps(folder: Path, module: PromptedLMM, inputs: dict[str, Tensor]) -> None:
    for task, recorded in stages(folder, "train_task").items():
        batch = start(module, inputs, recorded, task)
        trainables = [module.prompt, *module.head.parameters()]
        optimizer = torch.optim.AdamW(trainables, lr=read_meta(folder)["lr"], weight_decay=0.0)
        for expected in recorded["trajectory"]:
            torch.testing.assert_close(step(module, batch), expected, atol=2e-6, rtol=1e-6)
            optimizer.step()
        torch.testing.assert_close(module.prompt.detach(), recorded["prompt_after"], atol=1e-6, rtol=0)


@torch.no_grad()
def test_inference_selection_and_greedy_answers(folder: Path, module: PromptedLMM, inputs: dict[str, Tensor]) -> None:
    pool = load_file(folder / "train_task1.safetensors")
    for tasks, recorded in stages(folder, "infer_task").items():
        scores = similarity(inputs["image_key"], inputs["text_key"], prototypes(module, pool, tasks))
        torch.testing.assert_close(scores, recorded["similarity"], atol=2e-6, rtol=0)
        selected = select_for_inference(scores, k=3)
        assert torch.equal(selected, recorded["top"].flip(1))
        batch = batch_of(module, inputs, selected)
        for number in range(len(batch.ids)):
            one = slice(number, number + 1)
            end = int((batch.labels[number] == -100).long().cumprod(0).sum())  # the prompt: all before the answer
            embeddings = module.lmm.embed(
                batch.input_ids[one, :end], batch.pixel_values[one], torch.ones(1, dtype=torch.bool)
            )
            vectors, valid = gather_sets(pool["prompts"][:tasks], selected[one])
            embeddings, attention, _ = insert_prompts(embeddings, batch.attention[one, :end], vectors, valid, left=True)
            logits = module.lmm.logits(module.lmm.hidden(embeddings, attention)[:, -1])
            torch.testing.assert_close(logits[0], recorded["first_logits"][number], atol=1e-5, rtol=0)
            expected = recorded["generated"][number].tolist()
            found = module.lmm.generate(embeddings, attention, len(expected))[0]
            assert found == expected[: len(found)]
