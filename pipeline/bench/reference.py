"""A training step as in the official implementation, written from its description (docs/design.md 4, 4.11).

Prompt vectors are rows of the embedding table. The whole table is trainable, and all but the current rows are reset
before every step. Both CLIP towers run in the step, the prototypes of all tasks are recomputed, the LM head computes
logits of all positions, and activations are checkpointed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from pipeline.backbones.lmm import LMM
from pipeline.backbones.recompute import recomputing
from pipeline.bench.optimizer_step import OptimizerStep
from pipeline.bench.sizes import Size
from pipeline.data.collate import Batch
from pipeline.prompts.heads import ProjectionHead
from pipeline.prompts.insertion import insert_prompts

TEXT_TOKENS = 77


class ReferenceStep(OptimizerStep):
    """Steps on the model of `lmm`, whose weights stay unchanged; task `len(bank) + 1` is learned."""

    def __init__(self, lmm: LMM, size: Size, bank: Tensor, prompt: Tensor, towers: Towers) -> None:
        self.lmm, self.size, self.towers = lmm, size, towers
        tasks, (length, width) = len(bank) + 1, prompt.shape
        words = lmm.model.get_input_embeddings().weight.detach()
        rows = torch.cat([words, bank.to(words).flatten(0, 1), prompt.detach().to(words)])
        self.table = nn.Embedding(rows.shape[0], rows.shape[1], device=words.device, dtype=words.dtype)
        self.table.weight.data.copy_(rows)
        self.origin = self.table.weight.detach().clone()
        self.first = len(words)  # number of the first prompt row
        self.mask = torch.zeros(len(rows), 1, device=words.device, dtype=words.dtype)
        self.mask[-length:] = 1
        make = partial(ProjectionHead, width, size.key_width, dtype=words.dtype)
        self.heads = nn.ModuleList([make() for _ in range(tasks)]).to(words.device)
        self.heads[:-1].requires_grad_(False)
        super().__init__([*self.table.parameters(), *self.heads[-1].parameters()])

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        with torch.no_grad():  # the reset, on the whole table
            self.table.weight.copy_(self.origin * (1 - self.mask) + self.table.weight * self.mask)
        terms = self.terms(batch)
        return terms.sum(), terms

    def terms(self, batch: Batch) -> Tensor:
        """The loss terms [3]; an image with several questions is repeated for each."""
        length, tasks = self.size.prompt_length, len(self.heads)
        image_key, features = self.towers.image(self.lmm, batch.images["pixel_values"])
        text_key = self.towers.text(batch.input_ids[:, -self.size.question_tokens - self.size.answer_tokens :])
        rows = torch.arange(self.first, len(self.table.weight), device=batch.input_ids.device).reshape(tasks, length)
        prototypes = torch.stack([head(self.table(ids)).float() for head, ids in zip(self.heads, rows, strict=True)])
        # The similarities are computed as in the official code; the sets are those of the batch, so that all variants
        # do the same work on the same tokens.
        _ = cosine_similarity(image_key[:, None], prototypes[None].detach(), dim=-1)
        _ = cosine_similarity(text_key[:, None], prototypes[None].detach(), dim=-1)
        chosen = torch.cat([batch.selected, batch.selected.new_full((len(batch.selected), 1), tasks - 1)], dim=1)
        words = self.table(batch.input_ids)
        places = self.lmm.image_places(batch.input_ids)
        words = words.masked_scatter(places[..., None], features.to(words.dtype))
        valid = torch.ones(len(chosen), chosen.shape[1] * length, dtype=torch.bool, device=words.device)
        prompts = self.table(rows[chosen].flatten(1))
        embeddings, attention, labels = insert_prompts(words, batch.attention, prompts, valid, batch.labels)
        assert labels is not None
        with recomputing(self.lmm, "full", whole=True):
            hidden = self.lmm.decoder(inputs_embeds=embeddings, attention_mask=attention, use_cache=False)
        logits = self.lmm.logits(hidden.last_hidden_state)  # of all positions, in float32
        language = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        image = (1 - cosine_similarity(batch.image_key, prototypes[-1:], dim=-1)).mean()
        text = (1 - cosine_similarity(batch.text_key, prototypes[-1:], dim=-1)).mean()
        return torch.stack([language, image, text])

    @property
    def held(self) -> dict[str, Any]:
        """Tensors that live from step to step."""
        return {**super().held, "heads": list(self.heads.parameters()), "origin": self.origin}


class Towers:
    """CLIP's two towers as the official step runs them: the image tower is the language model's own."""

    def __init__(self, size: Size, device: str, dtype: torch.dtype) -> None:
        from transformers import CLIPTextConfig, CLIPTextModel

        config = CLIPTextConfig(
            vocab_size=1024,
            hidden_size=size.text_width,
            intermediate_size=4 * size.text_width,
            num_hidden_layers=size.text_layers,
            num_attention_heads=max(1, size.text_width // 32),
            max_position_embeddings=TEXT_TOKENS,
            bos_token_id=1022,
            eos_token_id=1023,
        )
        self.words = CLIPTextModel(config).to(device, dtype).eval().requires_grad_(False)
        self.to_keys = nn.Linear(size.vision_width, size.key_width, bias=False).to(device, dtype).requires_grad_(False)
        self.text_to_keys = (
            nn.Linear(size.text_width, size.key_width, bias=False).to(device, dtype).requires_grad_(False)
        )

    @torch.no_grad()
    def image(self, lmm: LMM, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [B, K] and projected features [n, D] of images, from one pass of the tower."""
        tower = lmm.model.model.vision_tower
        outputs = tower(pixels.to(lmm.dtype), output_hidden_states=True)
        features = lmm.projector()(outputs.hidden_states[-2][:, 1:])
        return self.to_keys(outputs.pooler_output).float(), features.flatten(0, 1)

    @torch.no_grad()
    def text(self, tokens: Tensor) -> Tensor:
        """Keys [B, K] of questions."""
        ids = torch.cat([tokens % 1022, tokens.new_full((len(tokens), 1), 1023)], dim=1)[:, -TEXT_TOKENS:]
        return self.text_to_keys(self.words(input_ids=ids).pooler_output).float()
