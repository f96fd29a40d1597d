"""The methods written down plainly on bare weights, and a folder of recorded runs at sizes of its own.

Independent of the package: towers as loops over blocks in [tokens, batch, width] order, texts as token slices, one
image at a time for CoCoOp. Only the formulas of docs/design.md 5.1 to 5.4.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import (
    conv2d,
    cross_entropy,
    embedding,
    layer_norm,
    linear,
    multi_head_attention_forward,
    relu,
)

Weights = dict[str, Tensor]
LENGTH = 77
START, END, IDS = 256, 257, 258


class Towers:
    """Both towers of one CLIP as functions of bare weights in Hugging Face names."""

    def __init__(self, weights: Weights, heads: dict[str, int]) -> None:
        self.weights, self.heads = weights, heads
        self.blocks = {
            tower: 1 + max(int(k.split(".")[3]) for k in weights if k.startswith(f"{tower}_model.encoder.layers."))
            for tower in ("text", "vision")
        }

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _block(self, x: Tensor, tower: str, number: int, mask: Tensor | None) -> Tensor:
        name = f"{tower}_model.encoder.layers.{number}"
        parts = [f"{name}.self_attn.{part}_proj" for part in "qkv"]
        y = self._norm(x, f"{name}.layer_norm1")
        y, _ = multi_head_attention_forward(
            y,
            y,
            y,
            x.shape[-1],
            self.heads[tower],
            torch.cat([self.weights[f"{p}.weight"] for p in parts]),
            torch.cat([self.weights[f"{p}.bias"] for p in parts]),
            None,
            None,
            False,
            0.0,
            self.weights[f"{name}.self_attn.out_proj.weight"],
            self.weights[f"{name}.self_attn.out_proj.bias"],
            need_weights=False,
            attn_mask=mask,
        )
        x = x + y
        y = self._linear(self._norm(x, f"{name}.layer_norm2"), f"{name}.mlp.fc1")
        return x + self._linear(y * torch.sigmoid(1.702 * y), f"{name}.mlp.fc2")

    def embed(self, ids: Tensor) -> Tensor:
        return embedding(ids, self.weights["text_model.embeddings.token_embedding.weight"])

    def text(self, embedded: Tensor, ids: Tensor, change: Callable[[Tensor, int], Tensor]) -> Tensor:
        """Features of embedded texts [K, T, D]; `change` is what happens to [T, K, D] before each block."""
        x = embedded + self.weights["text_model.embeddings.position_embedding.weight"]
        x = x.permute(1, 0, 2)
        mask = torch.full((len(x), len(x)), -math.inf).triu(1)
        for block in range(self.blocks["text"]):
            x = self._block(change(x, block), "text", block, mask)
        x = self._norm(x.permute(1, 0, 2), "text_model.final_layer_norm")
        return x[torch.arange(len(x)), ids.argmax(dim=-1)] @ self.weights["text_projection.weight"].T

    def image(self, pixels: Tensor, shallow: Tensor | None, change: Callable[[Tensor, int], Tensor]) -> Tensor:
        """Features of images; `shallow` [n, D] stand behind the patches, `change` acts on [T, B, D] before a block."""
        kernel = self.weights["vision_model.embeddings.patch_embedding.weight"]
        patches = conv2d(pixels, kernel, stride=kernel.shape[-1]).flatten(2).permute(0, 2, 1)
        cls = self.weights["vision_model.embeddings.class_embedding"].expand(len(pixels), 1, -1)
        x = torch.cat([cls, patches], dim=1) + self.weights["vision_model.embeddings.position_embedding.weight"]
        if shallow is not None:
            x = torch.cat([x, shallow.expand(len(x), -1, -1)], dim=1)
        x = self._norm(x, "vision_model.pre_layrnorm").permute(1, 0, 2)
        for block in range(self.blocks["vision"]):
            x = self._block(change(x, block), "vision", block, None)
        x = self._norm(x.permute(1, 0, 2)[:, 0], "vision_model.post_layernorm")
        return x @ self.weights["visual_projection.weight"].T

    def logits(self, images: Tensor, texts: Tensor) -> Tensor:
        images = images / images.norm(dim=-1, keepdim=True)
        texts = texts / texts.norm(dim=-1, keepdim=True)
        return self.weights["logit_scale"].exp() * images @ texts.t()


def unchanged(x: Tensor, block: int) -> Tensor:
    return x


def token_ids(text: str) -> list[int]:
    return [START, *text.lower().encode(), END]


class Reference:
    """One method on one CLIP: the words before the class name, and what a forward pass computes."""

    def __init__(self, towers: Towers, names: list[str], params: Weights, context: str) -> None:
        self.towers, self.params = towers, params
        names = [name.replace("_", " ") for name in names]
        texts = [token_ids(f"{context} {name}.") for name in names]
        self.ids = torch.tensor([ids + [0] * (LENGTH - len(ids)) for ids in texts])
        self.name_lengths = [len(name.encode()) for name in names]
        self.length = params["ctx"].shape[-2]

    def embedded(self, ctx: Tensor, position: str = "end") -> Tensor:
        """The texts [K, T, D] with the context vectors `ctx` [n, D] or [K, n, D] in their place."""
        if ctx.dim() == 2:
            ctx = ctx.expand(len(self.ids), -1, -1)
        whole = self.towers.embed(self.ids)
        prefix, suffix = whole[:, :1], whole[:, 1 + self.length :]
        if position == "end":
            return torch.cat([prefix, ctx, suffix], dim=1)
        half = self.length // 2 if position == "middle" else 0
        rows = [
            torch.cat([prefix[k], ctx[k, :half], suffix[k, :n], ctx[k, half:], suffix[k, n:]])
            for k, n in enumerate(self.name_lengths)
        ]
        return torch.stack(rows)

    def deep_text(self, x: Tensor, block: int) -> Tensor:
        """MaPLe's and MPL's text tower: rows 1..n replaced before block b by prompt b - 1."""
        prompt = self.params.get(f"compound_prompts_text.{block - 1}")
        if prompt is None:
            return x
        fresh = prompt.expand(x.shape[1], -1, -1).permute(1, 0, 2)
        return torch.cat([x[:1], fresh, x[1 + self.length :]])

    def coupled(self, name: str, prompt: Tensor) -> Tensor:
        return linear(prompt, self.params[f"{name}.weight"], self.params[f"{name}.bias"])

    def deep_image(self, x: Tensor, block: int, couplings: list[str], remove: int) -> Tensor:
        """MaPLe's and MPL's image tower: `remove` tokens leave at the end, one group per coupling enters there."""
        prompt = self.params.get(f"compound_prompts_text.{block - 1}")
        if prompt is None:
            return x
        fresh = torch.cat([self.coupled(name, prompt) for name in couplings])
        return torch.cat([x[: len(x) - remove], fresh.expand(x.shape[1], -1, -1).permute(1, 0, 2)])


def run(name: str, reference: Reference, pixels: Tensor, options: dict[str, Any]) -> dict[str, Tensor]:
    """Features and logits of one forward pass of the method `name`."""
    towers, params = reference.towers, reference.params
    if name in ("coop", "cocoop"):
        images = towers.image(pixels, None, unchanged)
    if name == "coop":
        texts = towers.text(reference.embedded(params["ctx"], options["position"]), reference.ids, unchanged)
    elif name == "cocoop":
        unit = images / images.norm(dim=-1, keepdim=True)
        rows = []
        for image in range(len(pixels)):
            shift = reference.coupled("meta_net.linear2", relu(reference.coupled("meta_net.linear1", unit[image])))
            text = towers.text(reference.embedded(params["ctx"] + shift), reference.ids, unchanged)
            rows.append(towers.logits(images[image], text))
        return {"image_features": images, "logits": torch.stack(rows)}
    else:
        slots, remove = options.get("add", 1), options.get("remove", reference.length)

        def couplings(block: int) -> list[str]:
            if name == "maple":
                return [f"compound_prompt_projections.{block - 1}"]
            return [f"txt2img_proj.{slot}.{block - 1}" for slot in range(slots)]

        shallow = reference.coupled("proj", params["ctx"])
        images = towers.image(pixels, shallow, lambda x, b: reference.deep_image(x, b, couplings(b), remove))
        texts = towers.text(reference.embedded(params["ctx"]), reference.ids, reference.deep_text)
    return {"image_features": images, "text_features": texts, "logits": towers.logits(images, texts)}


def context_words(name: str, length: int) -> str:
    """The words before the class name, by method."""
    placeholders = " ".join(["X"] * length)
    return {"maple": "a photo of a", "mpl": f"{placeholders} a photo of a"}.get(name, placeholders)


def recorded(
    name: str, reference: Reference, batch: Weights, options: dict[str, Any], sgd: dict[str, float]
) -> Weights:
    """What a fixture file holds of one run."""
    params = reference.params
    result = {f"param.{key}": value.detach().clone() for key, value in params.items()}
    outputs = run(name, reference, batch["pixel_values"], options)
    result |= {key: value.detach().contiguous() for key, value in outputs.items()}
    optimizer = torch.optim.SGD(list(params.values()), **sgd)  # type: ignore[arg-type]
    losses = []
    for number in range(3):
        optimizer.zero_grad()
        loss = cross_entropy(run(name, reference, batch["pixel_values"], options)["logits"], batch["labels"])
        loss.backward()
        if number == 0:
            result |= {f"grad.{key}": value.grad.clone() for key, value in params.items() if value.grad is not None}
        optimizer.step()
        losses.append(loss.detach())
    result["trajectory"] = torch.stack(losses)
    return result | {f"after.{key}": value.detach().clone() for key, value in params.items()}


SIZES = {"text_width": 48, "vision_width": 32, "joint": 40, "text_blocks": 4, "vision_blocks": 5}
NAMES = ["red_panda", "golf ball", "Tench", "a very long_name of some kind"]
RUNS: list[tuple[str, str, dict[str, Any]]] = [
    ("coop_unified3_middle", "coop", {"length": 3, "position": "middle"}),
    ("coop_csc2_front", "coop", {"length": 2, "position": "front", "csc": True}),
    ("coop_csc5_end", "coop", {"length": 5, "position": "end", "csc": True}),
    ("cocoop2", "cocoop", {"length": 2}),
    ("maple_ctx3_depth4", "maple", {"length": 3, "depth": 4}),
    ("maple_ctx1_depth1", "maple", {"length": 1, "depth": 1}),
    ("mpl_ctx3_add1_rm2_depth3", "mpl", {"length": 3, "add": 1, "remove": 2, "depth": 3}),
    ("mpl_ctx1_add3_rm0_depth2", "mpl", {"length": 1, "add": 3, "remove": 0, "depth": 2}),
    ("mpl_ctx2_add2_rm1_depth4", "mpl", {"length": 2, "add": 2, "remove": 1, "depth": 4}),
]


def start(method: str, options: dict[str, Any], generator: torch.Generator) -> Weights:
    """Random trainables of a run, in the recorded names."""
    text, vision = SIZES["text_width"], SIZES["vision_width"]
    length, depth = options["length"], options.get("depth", 1)
    shapes: dict[str, tuple[int, ...]] = {"ctx": (len(NAMES), length, text) if "csc" in options else (length, text)}
    if method == "cocoop":
        hidden = SIZES["joint"] // 16
        shapes |= {"meta_net.linear1.weight": (hidden, SIZES["joint"]), "meta_net.linear1.bias": (hidden,)}
        shapes |= {"meta_net.linear2.weight": (text, hidden), "meta_net.linear2.bias": (text,)}
    if method in ("maple", "mpl"):
        couplings = ["proj"]
        for j in range(depth - 1):
            shapes[f"compound_prompts_text.{j}"] = (length, text)
            if method == "maple":
                couplings.append(f"compound_prompt_projections.{j}")
            couplings.extend(f"txt2img_proj.{slot}.{j}" for slot in range(options.get("add", 0)))
        for name in couplings:
            shapes |= {f"{name}.weight": (vision, text), f"{name}.bias": (vision,)}
    return {k: (torch.randn(shape, generator=generator) * 0.1).requires_grad_() for k, shape in shapes.items()}


def record(folder: Path, seed: int = 3) -> Path:
    """Write a folder of the fixtures' layout: a random CLIP, images and one file for each of `RUNS`."""
    from transformers import CLIPConfig, CLIPModel

    def tower(width: int, blocks: int) -> dict[str, Any]:
        sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": blocks}
        return {**sizes, "num_attention_heads": 2, "hidden_act": "quick_gelu"}

    ids = {"vocab_size": IDS, "bos_token_id": START, "eos_token_id": END, "pad_token_id": 0}
    config = CLIPConfig(
        text_config={**tower(SIZES["text_width"], SIZES["text_blocks"]), **ids, "max_position_embeddings": LENGTH},
        vision_config={**tower(SIZES["vision_width"], SIZES["vision_blocks"]), "image_size": 24, "patch_size": 12},
        projection_dim=SIZES["joint"],
    )
    generator = torch.Generator().manual_seed(seed)
    model = CLIPModel(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name != "logit_scale":
                centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                value.copy_(centre + 0.1 * torch.randn(value.shape, generator=generator))
    model.save_pretrained(folder / "clip_tiny")
    towers = Towers({k: v.detach() for k, v in model.state_dict().items()}, {"text": 2, "vision": 2})
    batch = {
        "pixel_values": torch.randn(5, 3, 24, 24, generator=generator),
        "labels": torch.randint(len(NAMES), (5,), generator=generator),
    }
    save_file(batch, folder / "inputs.safetensors")
    sgd = {"lr": 0.01, "momentum": 0.8, "weight_decay": 1e-3}
    sentence = " ".join(["SGD", *(f"{name} {value}" for name, value in sgd.items())])
    meta = {"classnames": NAMES, "dims": {"context_length": LENGTH}, "optimizer": sentence}
    (folder / "meta.json").write_text(json.dumps(meta), "utf-8")
    for name, method, options in RUNS:
        params = start(method, options, generator)
        reference = Reference(towers, NAMES, params, context_words(method, options["length"]))
        save_file(recorded(method, reference, batch, options, sgd), folder / f"{name}.safetensors")
    return folder
