"""Parts of an assembled model for tests: an EfficientNet-Lite0 with random weights, and tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from tests import tiny
from tests.backbones.tiny_families import byte_tokenizer

# Of each stage: blocks, kernel, stride, expansion, channels out; after a stem of 32 channels.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
EPS = 1e-3
IMAGE = 64  # pixels: 2 x 2 features
PLAIN_CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nBe kind."
    "<|im_end|>\n{% endif %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def lite0(seed: int = 0) -> dict[str, Tensor]:
    """Random weights of EfficientNet-Lite0 by the names of efficientnet_lite_pytorch."""
    draw = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}

    def convolution(name: str, out: int, within: int, kernel: int) -> None:
        state[f"{name}.weight"] = (
            torch.randn(out, within, kernel, kernel, generator=draw) * (2 / within / kernel**2) ** 0.5
        )

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"] = 1 + 0.1 * torch.randn(width, generator=draw)
        state[f"{name}.bias"] = 0.1 * torch.randn(width, generator=draw)
        state[f"{name}.running_mean"] = 0.1 * torch.randn(width, generator=draw)
        state[f"{name}.running_var"] = 0.5 + torch.rand(width, generator=draw)
        state[f"{name}.num_batches_tracked"] = torch.tensor(0)

    convolution("_conv_stem", 32, 3, 3)
    norm("_bn0", 32)
    width, number = 32, 0
    for blocks, kernel, _, expansion, out in STAGES:
        for _ in range(blocks):
            name, inside = f"_blocks.{number}", width * expansion
            if expansion != 1:
                convolution(f"{name}._expand_conv", inside, width, 1)
                norm(f"{name}._bn0", inside)
            convolution(f"{name}._depthwise_conv", inside, 1, kernel)
            norm(f"{name}._bn1", inside)
            convolution(f"{name}._project_conv", out, inside, 1)
            norm(f"{name}._bn2", out)
            width, number = out, number + 1
    convolution("_conv_head", 1280, 320, 1)
    norm("_bn1", 1280)
    state["_fc.weight"] = torch.randn(1000, 1280, generator=draw) * 0.03
    state["_fc.bias"] = torch.zeros(1000)
    return state


def lite0_features(state: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """Features [n, 1280, rows, columns] of these weights, with TensorFlow's "same" padding and ReLU6."""

    def convolution(x: Tensor, name: str, stride: int = 1, groups: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        kernel, side = weight.shape[-1], x.shape[-1]
        missing = max(0, (-(-side // stride) - 1) * stride + kernel - side)
        x = F.pad(x, (missing // 2, missing - missing // 2) * 2)
        return F.conv2d(x, weight, stride=stride, groups=groups)

    def norm(x: Tensor, name: str) -> Tensor:
        mean, variance, scale, shift = (state[f"{name}.{s}"] for s in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, variance, scale, shift, eps=EPS)

    x, number = F.relu6(norm(convolution(pixels, "_conv_stem", 2), "_bn0")), 0
    for blocks, _, stride, expansion, _ in STAGES:
        for block in range(blocks):
            name, before = f"_blocks.{number}", x
            if expansion != 1:
                x = F.relu6(norm(convolution(x, f"{name}._expand_conv"), f"{name}._bn0"))
            step = stride if block == 0 else 1
            x = F.relu6(norm(convolution(x, f"{name}._depthwise_conv", step, x.shape[1]), f"{name}._bn1"))
            x = norm(convolution(x, f"{name}._project_conv"), f"{name}._bn2")
            x, number = (x + before if block else x), number + 1
    return F.relu6(norm(convolution(x, "_conv_head"), "_bn1"))


def save_language(folder: Path, template: str | None = PLAIN_CHATML) -> Path:
    """A tiny Llama with tied embeddings and a byte tokenizer, whose template takes texts only."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, "<|im_end|>", "<|im_end|>", False)
    tokenizer.chat_template = template
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=tiny.HIDDEN,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=True,
        initializer_range=0.15,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_projector(path: Path, vision: int, language: int = tiny.HIDDEN) -> Path:
    """A random projector in float16."""
    draw = torch.Generator().manual_seed(5)
    shapes = {
        "linear_1.weight": (language, vision),
        "linear_1.bias": (language,),
        "linear_2.weight": (language, language),
        "linear_2.bias": (language,),
    }
    save_file({name: (0.1 * torch.randn(shape, generator=draw)).half() for name, shape in shapes.items()}, path)
    return path


def save_parts(folder: Path) -> dict[str, Any]:
    """All parts under `folder`, and the fields of a recipe that joins them."""
    (folder / "vision").mkdir(parents=True)
    (folder / "projector").mkdir()
    torch.save(lite0(), folder / "vision" / "lite0.pth")
    save_language(folder / "language")
    save_projector(folder / "projector" / "projector.safetensors", 1280)
    return {
        "name": "pieces",
        "vision": {
            "folder": "vision",
            "file": "lite0.pth",
            "layout": "efficientnet_lite",
            "image_size": IMAGE,
            "mean": 0.498,
            "deviation": 0.502,
            "licence": "Apache-2.0",
        },
        "language": {"folder": "language", "licence": "MIT"},
        "projector": {"folder": "projector", "file": "projector.safetensors", "licence": "CC0-1.0"},
        "dtype": "float32",
        "note": "Of random numbers.",
    }


def save_recipe(folder: Path, fields: dict[str, Any]) -> Path:
    """Write a recipe beside the parts."""
    path = folder / "pieces.yaml"
    path.write_text(json.dumps(fields))  # JSON is YAML
    return path
