"""Trains the projector and the decoder on cached, whitened features of the frozen vision tower.

Rows are packed (behaviours.py): the questions about one image are branches after a shared prefix, separated by a
four-dimensional attention mask and positions that restart, which trains several times more answers per second.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from data_prep.nano.behaviours import BEHAVIOUR_ROWS, IMAGE_TOKENS, SET_LENGTH, Batch, RowMaker
from data_prep.nano.skills import SKILLS, TASK_FORMATS

SEEING = 0.3  # share of the training time with mostly plain questions
PLAIN_SHARE = (0.85, 0.35)  # share of batches without sets, in that time and afterwards
# Twice the weight for skills that find an object by one attribute and name another, which are learned slowest.
BINDING = np.array([2.0 if skill in ("colour_of", "shape_of", "box_of") else 1.0 for skill in SKILLS])


def llava_config(vision: CLIPVisionModel, vocabulary: int, image_token: int) -> LlavaConfig:
    """LLaVA architecture at nano size: the decoder has 4 layers of width 192."""
    text = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        hidden_act="relu",
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    return LlavaConfig(
        vision_config=vision.config,
        text_config=text,
        image_token_index=image_token,
        projector_hidden_act="gelu",
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=True,
    )


def build_llava(vision: CLIPVisionModel, tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """A new LLaVA with the trained tower; projector and decoder are random."""
    llava = LlavaForConditionalGeneration(
        llava_config(vision, len(tokenizer), tokenizer.convert_tokens_to_ids("<image>"))
    )
    llava.model.vision_tower.load_state_dict(vision.state_dict())
    return llava


@dataclass
class Whitening:
    """z = (x - mean) @ matrix has unit covariance; merged into the projector's first layer after training."""

    mean: torch.Tensor  # [D]
    matrix: torch.Tensor  # [D, D]

    @classmethod
    def of(cls, features: torch.Tensor) -> Whitening:
        sample = features[torch.randperm(len(features))[:4000]].float().flatten(0, 1)
        mean = sample.mean(0)
        values, vectors = torch.linalg.eigh(torch.cov((sample - mean).T))
        return cls(mean, vectors * (values.clamp_min(0) + 1e-3 * values.mean()).rsqrt())

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return (x.float() - self.mean) @ self.matrix

    def to(self, device: torch.device) -> Whitening:
        return Whitening(self.mean.to(device), self.matrix.to(device))

    def fold_into(self, layer: nn.Linear) -> None:
        weight = layer.weight.data @ self.matrix.T  # layer(x) now equals what layer(z) was
        layer.bias.data = layer.bias.data - weight @ self.mean
        layer.weight.data = weight


class Speaker(nn.Module):
    """The LLaVA in training, with the table of behaviour vectors, which is dropped afterwards."""

    def __init__(self, llava: LlavaForConditionalGeneration, features: torch.Tensor, whitening: Whitening) -> None:
        super().__init__()
        self.llava, self.features, self.whitening = llava, features, whitening
        self.behaviours = nn.Embedding(BEHAVIOUR_ROWS, llava.config.text_config.hidden_size)
        nn.init.normal_(self.behaviours.weight, std=0.02)

    @classmethod
    def of(cls, llava: LlavaForConditionalGeneration, features: torch.Tensor) -> Speaker:
        return cls(llava, features, Whitening.of(features))

    def finished(self) -> LlavaForConditionalGeneration:
        """The LLaVA alone, with the whitening merged so that it reads the tower's raw features; changes this object."""
        self.whitening.fold_into(self.llava.model.multi_modal_projector.linear_1)
        return self.llava

    def forward(self, batch: Batch, noise: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns logits [A, V] at the answer positions, their targets [A], and the row and branch of each [A, 2]."""
        table = self.llava.get_input_embeddings()
        device = table.weight.device
        embeds = table(torch.from_numpy(batch.ids).to(device))
        pieces = [embeds[:, :1]]
        count = batch.sets.shape[1]
        if count:
            rows = torch.from_numpy(batch.sets).to(device)
            scale = table.weight.detach().pow(2).mean().sqrt()
            sets = self.behaviours(rows.clamp_min(0))
            sets = torch.where((rows < 0).unsqueeze(-1), 1.5 * scale * torch.randn_like(sets), sets)
            sets = sets + noise * scale * torch.rand(len(rows), count, 1, 1, device=device) * torch.randn_like(sets)
            pieces.append(sets.flatten(1, 2))
        start = 1 + SET_LENGTH * count + 3  # after the three tokens of "USER: "
        seen = self.whitening.to(device).apply(self.features[torch.from_numpy(batch.scene)].to(device))
        image = self.llava.model.multi_modal_projector(seen)
        pieces += [embeds[:, 1 + SET_LENGTH * count : start], image, embeds[:, start + IMAGE_TOKENS :]]
        branch = torch.from_numpy(batch.branch).to(device)
        same = (branch[:, None, :] == branch[:, :, None]) | (branch[:, None, :] == 0)
        causal = torch.ones(branch.shape[1], branch.shape[1], dtype=torch.bool, device=device).tril()
        hidden = self.llava.model.language_model(
            inputs_embeds=torch.cat(pieces, dim=1),
            attention_mask=(same & causal)[:, None],
            position_ids=torch.from_numpy(batch.position).to(device),
            use_cache=False,
        ).last_hidden_state
        target = torch.from_numpy(batch.target).to(device)
        where = (target != -100).nonzero()
        at = (where[:, 0], where[:, 1])
        return self.llava.lm_head(hidden[at]), target[at], torch.stack([where[:, 0], branch[at]], 1)


def _exact(logits: torch.Tensor, target: torch.Tensor, owner: torch.Tensor, batch: Batch) -> list[tuple[int, bool]]:
    """Per branch, its skill and whether every answer token is right."""
    right = (logits.argmax(-1) == target).tolist()
    verdict: dict[tuple[int, int], bool] = {}
    for (row, branch), ok in zip(owner.tolist(), right, strict=True):
        verdict[row, branch] = verdict.get((row, branch), True) and ok
    return [(batch.skills[row][branch - 1], ok) for (row, branch), ok in verdict.items()]


@torch.no_grad()
def measure(speaker: Speaker, maker: RowMaker, batches: int = 6, rows: int = 24) -> str:
    """Exact match (teacher-forced) in percent: plain questions, unseen formats by one set, and by the last of three."""
    lines = []
    formats = tuple(TASK_FORMATS.values())
    for label, count in (("plain", 0), ("one set", 1), ("three sets", 3)):
        tally: dict[int, list[bool]] = {}
        for _ in range(batches):
            batch = maker.batch(rows, count, formats)
            logits, target, owner = speaker(batch, 0.0)
            for skill, ok in _exact(logits, target, owner, batch):
                tally.setdefault(skill, []).append(ok)
        shown = " ".join(f"{SKILLS[s]}={100 * np.mean(v):.0f}" for s, v in sorted(tally.items()))
        lines.append(f"  {label:10s} {100 * np.mean([o for v in tally.values() for o in v]):.1f} | {shown}")
    return "\n".join(lines)


def train_language(
    speaker: Speaker,
    maker: RowMaker,
    fresh: tuple[RowMaker, torch.Tensor],
    minutes: float,
    rows: int = 12,
    lr: float = 2e-3,
    save: Callable[[], None] | None = None,
) -> None:
    """Trains projector, decoder and behaviour table; skills with more errors are drawn more often.

    Args:
        speaker: the model.
        maker: makes training batches.
        fresh: batches and features of unseen scenes, for the scores that are printed.
        minutes: wall clock time.
        rows: rows per batch.
        lr: highest learning rate.
        save: called every 500 steps.
    """
    trained = [
        *speaker.llava.model.language_model.parameters(),
        *speaker.llava.model.multi_modal_projector.parameters(),
    ]
    trained += list(speaker.behaviours.parameters())
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    right = np.zeros(len(SKILLS))
    started, step, average = time.time(), 0, None
    while (spent := (time.time() - started) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 200) * min(1.0, 2.0 * (1 - spent) + 0.01)
        # First mostly plain questions, until the decoder uses the image, then more batches with behaviour sets.
        batch = maker.batch(rows, maker.set_count(PLAIN_SHARE[0] if spent < SEEING else PLAIN_SHARE[1]))
        logits, target, owner = speaker(batch, noise=0.5)
        loss = F.cross_entropy(logits, target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        for skill, ok in _exact(logits, target, owner, batch):
            right[skill] += 0.01 * (float(ok) - right[skill])
        maker.hardness = (1.12 - right) * BINDING
        step += 1
        if step % 50 == 0:
            print(
                f"language step {step} {100 * spent:.1f}% loss {average:.3f}, {time.time() - started:.0f} s",
                flush=True,
            )
        if step % 500 == 0:
            kept, speaker.features = speaker.features, fresh[1]
            print(measure(speaker, fresh[0]), flush=True)
            speaker.features = kept
            if save is not None:
                save()
