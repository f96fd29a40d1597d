"""The method once more in a hundred lines of plain torch, to record a fixture folder of other sizes.

It shares no code with the pipeline: one sample at a time, no padding, no key/value cache, the formulas of
docs/design.md 4 written out. It does not replace numbers of the real reference; it shows that the parity suite, and
what it tests, holds for any sizes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, silu

from tests import tiny

L, TASKS, K, D = 3, 4, 20, tiny.HIDDEN
LR, NEW_TOKENS, PAD, EOS, IMAGE_MARK = 0.02, 5, 0, 2, -200
QUESTIONS = ["what is this?", "how many circles do you see in the whole picture?", "a or b?", "and now?", "why so?"]
ANSWERS = ["red", "seventeen", "b", "it is blue", "no"]


def record(folder: Path) -> Path:
    """Write meta.json, llava_tiny/, inputs, train_task<t> and infer_task<t> for five samples and four tasks."""
    from transformers import LlavaForConditionalGeneration

    tiny.save_llava(folder / "llava_tiny", seed=3)
    model = LlavaForConditionalGeneration.from_pretrained(folder / "llava_tiny", dtype=torch.float32)
    model.requires_grad_(False).eval()
    (folder / "meta.json").write_text(json.dumps({"prompt_length": L, "num_tasks": TASKS, "key_dim": K, "lr": LR}))
    with torch.random.fork_rng():
        torch.manual_seed(11)
        samples = [_Sample(model, question, answer) for question, answer in zip(QUESTIONS, ANSWERS, strict=True)]
        sets: dict[str, Tensor] = {
            "prompts": torch.randn(TASKS, L, D) * 0.2,
            "head.fc1.weight": torch.randn(TASKS, D, D) * D**-0.5,
            "head.fc1.bias": torch.randn(TASKS, D) * 0.1,
            "head.fc2.weight": torch.randn(TASKS, K, D) * D**-0.5,
            "head.fc2.bias": torch.randn(TASKS, K) * 0.1,
        }
    _save_inputs(folder, samples)
    for task in range(1, TASKS + 1):
        save_file(_train(model, samples, sets, task), folder / f"train_task{task}.safetensors")
        save_file(_infer(model, samples, sets, task), folder / f"infer_task{task}.safetensors")
    return folder


class _Sample:
    """Token ids with one image mark, the image as language-model features, and random keys."""

    def __init__(self, model: Any, question: str, answer: str) -> None:
        text = tiny.byte_tokenizer()
        before, after = text("USER: ").input_ids, text(f"\n{question} ASSISTANT:", add_special_tokens=False).input_ids
        self.prompt = [*before, IMAGE_MARK, *after]
        self.answer = [*text(f" {answer}", add_special_tokens=False).input_ids, EOS]
        self.pixels = torch.randn(3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
        self.keys = torch.randn(2, K)  # image, text
        hidden = model.model.vision_tower(self.pixels[None], output_hidden_states=True).hidden_states[-2]
        self.image = model.model.multi_modal_projector(hidden[:, 1:])[0]

    def embed(self, model: Any, sets: list[Tensor], answer: list[int]) -> Tensor:
        table = model.model.language_model.embed_tokens.weight
        place = self.prompt.index(IMAGE_MARK)
        words = table[[*self.prompt[:place], *self.prompt[place + 1 :], *answer]]
        return torch.cat([words[:1], *sets, words[1:place], self.image, words[place:]])[None]


def _prototype(prompt: Tensor, head: dict[str, Tensor]) -> Tensor:
    hidden = silu(prompt @ head["head.fc1.weight"].T + head["head.fc1.bias"])
    return (hidden @ head["head.fc2.weight"].T + head["head.fc2.bias"]).mean(0)


def _similarity(samples: list[_Sample], sets: dict[str, Tensor], count: int) -> Tensor:
    heads = [{name: value[task] for name, value in sets.items() if name != "prompts"} for task in range(count)]
    prototypes = [_prototype(sets["prompts"][task], head) for task, head in enumerate(heads)]
    rows = [[cosine_similarity(s.keys, p[None], dim=-1).mean() for p in prototypes] for s in samples]
    return torch.tensor(rows).reshape(len(samples), count)


def _logits(model: Any, embeddings: Tensor) -> Tensor:
    return model.lm_head(model.model.language_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state)[0]


def _train(model: Any, samples: list[_Sample], sets: dict[str, Tensor], task: int) -> dict[str, Tensor]:
    found = {name: value.clone() for name, value in sets.items()}
    order = [list(range(task - 1))] * len(samples)
    if task >= 3:
        found["similarity_previous"] = _similarity(samples, sets, task - 1)
        found["top_previous"] = found["similarity_previous"].topk(2, dim=1).indices
        order = [row[::-1] for row in found["top_previous"].tolist()]
    current = {name: value[task - 1].clone().requires_grad_() for name, value in sets.items()}

    def losses() -> tuple[Tensor, list[Tensor]]:
        answers = []
        for sample, earlier in zip(samples, order, strict=True):
            prompts = [*(sets["prompts"][number] for number in earlier), current["prompts"]]
            logits = _logits(model, sample.embed(model, prompts, sample.answer))
            answers.append(logits[-len(sample.answer) - 1 : -1])
        targets = torch.tensor([token for sample in samples for token in sample.answer])
        prototype = _prototype(current["prompts"], current)
        image, text = (
            1 - torch.stack([cosine_similarity(s.keys[key], prototype, dim=0) for s in samples]).mean()
            for key in (0, 1)
        )
        return torch.stack([cross_entropy(torch.cat(answers), targets), image, text]), answers

    terms, answers = losses()
    terms.sum().backward()
    found.update(zip(("loss_lm", "loss_image", "loss_text"), terms.detach().unbind(), strict=True))
    found.update({f"answer_logits.{number}": value.detach() for number, value in enumerate(answers)})
    for name, value in current.items():
        assert value.grad is not None
        found["grad.prompt" if name == "prompts" else f"grad.{name}"] = value.grad.clone()
    optimizer, trajectory = torch.optim.AdamW(current.values(), lr=LR, weight_decay=0.0), []
    for _ in range(3):
        optimizer.zero_grad()
        terms, _ = losses()
        terms.sum().backward()
        optimizer.step()
        trajectory.append(terms.detach())
    found.update(trajectory=torch.stack(trajectory), prompt_after=current["prompts"].detach().clone())
    return {name: value.contiguous().clone() for name, value in found.items()}


@torch.no_grad()
def _infer(model: Any, samples: list[_Sample], sets: dict[str, Tensor], tasks: int) -> dict[str, Tensor]:
    scores = _similarity(samples, sets, tasks)
    top = scores.topk(min(3, tasks), dim=1).indices
    first, generated = [], []
    for sample, row in zip(samples, top.tolist(), strict=True):
        prompts, answer = [sets["prompts"][number] for number in row[::-1]], list[int]()
        while len(answer) < NEW_TOKENS and EOS not in answer:
            logits = _logits(model, sample.embed(model, prompts, answer))[-1]
            first += [logits] if not answer else []
            answer.append(int(logits.argmax()))
        generated.append(answer + [PAD] * (NEW_TOKENS - len(answer)))
    return {
        "similarity": scores,
        "top": top,
        "first_logits": torch.stack(first),
        "generated": torch.tensor(generated),
    }


def _save_inputs(folder: Path, samples: list[_Sample]) -> None:
    width = max(len(s.prompt) + len(s.answer) for s in samples)

    def padded(rows: list[list[int]], value: int) -> Tensor:
        return torch.tensor([row + [value] * (width - len(row)) for row in rows])

    save_file(
        {
            "input_ids": padded([s.prompt + s.answer for s in samples], PAD),
            "labels": padded([[-100] * len(s.prompt) + s.answer for s in samples], -100),
            "attention_mask": padded([[1] * (len(s.prompt) + len(s.answer)) for s in samples], 0),
            "pixel_values": torch.stack([s.pixels for s in samples]),
            "image_key": torch.stack([s.keys[0] for s in samples]),
            "text_key": torch.stack([s.keys[1] for s in samples]),
        },
        folder / "inputs.safetensors",
    )
