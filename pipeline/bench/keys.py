"""CLIP keys of a prepared split: the share of the time that is spent in CLIP's towers, which is the lower bound."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from data_prep.keys import write_keys
from pipeline.backbones.clip import KeyEncoder, key_identity
from pipeline.bench import measure
from pipeline.bench.noise import write_noise
from pipeline.bench.sizes import SIZES, Size
from pipeline.config.paths import PROJECT
from pipeline.data.shards import KEYS_FILE

TOKENIZER = "data_prep/nano/checkpoints/clip"


def bench_keys(
    size_name: str = "base", samples: int = 128, batch: int = 32, workers: int = 2, device: str = "cpu"
) -> dict[str, Any]:
    """Compute the keys of noise images with a random CLIP, and measure how the time is spent."""
    size = SIZES[size_name]
    with TemporaryDirectory() as temporary:
        clip, split = save_clip(Path(temporary) / "clip", size), write_noise(Path(temporary) / "split", samples)
        encoder = KeyEncoder(clip, device=device)
        spent = {"image tower": 0.0, "text tower": 0.0}
        model: Any = encoder.model
        for name, part in (("get_image_features", "image tower"), ("get_text_features", "text tower")):
            setattr(model, name, _timed(getattr(model, name), spent, part, device))
        identity = key_identity(clip)
        write_keys(split, identity, lambda: encoder, batch, workers)  # warms up
        (split / KEYS_FILE).unlink()
        spent.update(dict.fromkeys(spent, 0.0))
        whole = measure.seconds(lambda: write_keys(split, identity, lambda: encoder, batch, workers))
    towers = sum(spent.values())
    return {
        "size": size_name,
        "samples": samples,
        "batch": batch,
        "workers": workers,
        "machine": measure.machine(device),
        "samples_per_s": round(samples / whole, 2),
        "seconds": {"whole": round(whole, 6), **{name: round(value, 6) for name, value in spent.items()}},
        "share_in_towers": round(towers / whole, 3),
    }


def save_clip(folder: Path, size: Size) -> Path:
    """Write a random CLIP of this size, with the tokenizer that ships with the project."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    make_clip(size).save_pretrained(folder)
    side = size.image_side
    CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(
        folder
    )
    for path in (PROJECT / TOKENIZER).glob("*token*.json"):
        shutil.copy(path, folder)
    return folder


def make_clip(size: Size) -> Any:
    """A CLIP of this size with random weights in float32, on the CPU."""
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(
        vision_config={
            "hidden_size": size.vision_width,
            "intermediate_size": 4 * size.vision_width,
            "patch_size": size.patch,
            "num_hidden_layers": size.vision_layers,
            "num_attention_heads": size.vision_heads,
            "image_size": size.image_side,
        },
        text_config={
            "hidden_size": size.text_width,
            "intermediate_size": 4 * size.text_width,
            "vocab_size": 8192,
            "num_hidden_layers": size.text_layers,
            "num_attention_heads": max(1, size.text_width // 32),
            "max_position_embeddings": 77,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        projection_dim=size.key_width,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CLIPModel(config).eval().requires_grad_(False)


def _timed(call: Callable[..., Any], spent: dict[str, float], part: str, device: str) -> Callable[..., Any]:
    @wraps(call)
    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        result = call(*args, **kwargs)
        if device != "cpu":
            torch.cuda.synchronize()
        spent[part] += time.perf_counter() - began
        return result

    return timed
