"""An exported checkpoint as other software loads it, and the run's own computation beside it."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.adapter.answering import Answerer, Question
from pipeline.backbones.lmm_processor import load_processor
from pipeline.config.models import ModelConfig
from pipeline.data.collate import collate_prompts
from pipeline.data.selection import Selection
from pipeline.prompts.embedding import embed_with_rows


def photo(width: int, height: int) -> bytes:
    """A PNG of noise."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """transformers' model and processor of a checkpoint."""
    from transformers import AutoModelForImageTextToText

    # AutoProcessor itself asks for torchvision where a processor has videos.
    processor = load_processor(ModelConfig(path=str(folder)))
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval(), processor


def inputs_of(processor: Any, question: Question, names: Sequence[str]) -> dict[str, Any]:
    """What the checkpoint's own processor and chat template make of a question with these sets."""
    parts: list[dict[str, Any]] = [{"type": "text", "text": question.text}]
    if question.image is not None:
        parts.insert(0, {"type": "image", "image": Image.open(io.BytesIO(question.image)).convert("RGB")})
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    messages = [{"role": "user", "content": parts}]
    return dict(processor.apply_chat_template(messages, prompt_sets=list(names), **options))


@torch.no_grad()
def run_logits(adapter: Answerer, question: Question, sets: Sequence[int]) -> Tensor:
    """Scores [N, V] of the run's own computation for a question with these sets."""
    routed = adapter.route([question])
    batch = collate_prompts(routed.examples, [0], Selection(torch.tensor([list(sets)], dtype=torch.long)))
    tensors = {name: value.to(adapter.lmm.dtype) for name, value in adapter.pool.tensors.items()}
    rows = adapter.entry.rows(tensors, batch)
    found = embed_with_rows(adapter.lmm, batch, rows, adapter.entry.insertion or "after_bos")
    return adapter.lmm.logits(adapter.lmm.hidden(found.vectors, found.attention, found.places, batch.images))[0]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))
