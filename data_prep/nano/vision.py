"""Trains the vision tower (a ViT) that the LLaVA and the CLIP share, with attribute classifiers on drawn scenes.

The classifiers are dropped afterwards. The tower's patch features then encode objects and their positions; it is frozen
before the decoder is trained, which reads cached features.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from data_prep.nano.scenes import COLOURS, DRAW, FAMILIES, LETTERS, SHAPES, SIZE, Scene

PATCH = 8
SIDE = SIZE // PATCH  # patches per side
BINS = SIZE // 4 + 1  # box coordinates in steps of 4 pixels
MEAN, STD = 0.5, 0.5
POOL_SHARES = {"shapes": 0.42, "digit": 0.16, "text": 0.24, "chart": 0.18}
COLOUR_ID = {name: i for i, name in enumerate(COLOURS)}
SHAPE_ID = {name: i for i, name in enumerate(SHAPES)}

# Number of classes by name; dense heads classify every patch, pooled heads the image.
DENSE_HEADS = {"shape": len(SHAPES) + 1, "colour": len(COLOURS) + 1, "letter": len(LETTERS) + 1} | dict.fromkeys(
    ("left", "top", "right", "bottom"), BINS
)
POOLED_HEADS = (
    {"family": len(FAMILIES), "digit": 10, "ink": len(COLOURS), "count": 6, "bars": 6}
    | dict.fromkeys(("tallest", "shortest"), len(COLOURS))
    | {f"letter{slot}": len(LETTERS) + 1 for slot in range(3)}
    | {f"count_{name}": 6 for name in (*COLOURS, *SHAPES)}
)


def vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        hidden_act="relu",
        projection_dim=64,
        attn_implementation="eager",
    )


@dataclass
class ScenePool:
    """Drawn scenes and their labels: pixels [N, 48, 48, 3] uint8, labels by name as int64 (-100: unknown)."""

    scenes: list[Scene]
    pixels: np.ndarray
    dense: dict[str, np.ndarray]  # [N, 36]
    pooled: dict[str, np.ndarray]  # [N]


def draw_pool(count: int, seed: int) -> ScenePool:
    """Draws `count` labelled scenes, in the shares of POOL_SHARES and ordered by family."""
    rng = np.random.default_rng(seed)
    scenes = [DRAW[family](rng) for family, share in POOL_SHARES.items() for _ in range(round(share * count))]
    dense = {name: np.full((len(scenes), SIDE * SIDE), -100) for name in DENSE_HEADS}
    pooled = {name: np.full(len(scenes), -100) for name in POOLED_HEADS}
    for row, scene in enumerate(scenes):
        _label(scene, {k: v[row] for k, v in dense.items()}, pooled, row)
    pixels = np.stack([s.image for s in scenes])
    for scene in scenes:
        scene.image = pixels[:0]  # frees the image, which is in `pixels`
    return ScenePool(scenes, pixels, dense, pooled)


def _overlap(box: tuple[int, int, int, int], row: int, column: int) -> int:
    x, y = column * PATCH, row * PATCH
    return max(0, min(box[2], x + PATCH) - max(box[0], x)) * max(0, min(box[3], y + PATCH) - max(box[1], y))


def _label(scene: Scene, dense: dict[str, np.ndarray], pooled: dict[str, np.ndarray], at: int) -> None:
    pooled["family"][at] = FAMILIES.index(scene.family)
    if scene.family == "digit":
        pooled["digit"][at] = scene.digit
        pooled["ink"][at] = COLOUR_ID[scene.colour or ""]
    elif scene.family == "text":
        pooled["ink"][at] = COLOUR_ID[scene.colour or ""]
        for slot in range(3):
            letters = scene.letters or ""
            pooled[f"letter{slot}"][at] = LETTERS.index(letters[slot]) if slot < len(letters) else len(LETTERS)
    else:
        dense["colour"][:] = len(COLOURS)
        dense["shape"][:] = len(SHAPES) if scene.family == "shapes" else -100
        for patch in range(SIDE * SIDE):
            best = max(scene.things, key=lambda t: _overlap(t.box, *divmod(patch, SIDE)))
            if _overlap(best.box, *divmod(patch, SIDE)) < 8:
                continue
            dense["colour"][patch] = COLOUR_ID[best.colour]
            if scene.family == "shapes":
                dense["shape"][patch] = SHAPE_ID[best.shape]
            for name, value in zip(("left", "top", "right", "bottom"), best.box, strict=True):
                dense[name][patch] = round(value / 4)
        if scene.family == "chart":
            heights = [t.box[1] for t in scene.things]
            pooled["bars"][at] = len(scene.things)
            pooled["tallest"][at] = COLOUR_ID[scene.things[int(np.argmin(heights))].colour]
            pooled["shortest"][at] = COLOUR_ID[scene.things[int(np.argmax(heights))].colour]
        else:
            pooled["count"][at] = len(scene.things)
            for colour in COLOURS:
                pooled[f"count_{colour}"][at] = sum(t.colour == colour for t in scene.things)
            for shape in SHAPES:
                pooled[f"count_{shape}"][at] = sum(t.shape == shape for t in scene.things)


class AttributeHeads(nn.Module):
    """Auxiliary classifiers: a linear layer per dense label, an attention query and a linear layer per pooled label."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(POOLED_HEADS), width) * 0.02)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.dense = nn.ModuleDict({k: nn.Linear(width, n) for k, n in DENSE_HEADS.items()})
        self.pooled = nn.ModuleDict({k: nn.Linear(width, n) for k, n in POOLED_HEADS.items()})
        self.cls = nn.ModuleDict({k: nn.Linear(width, n) for k, n in POOLED_HEADS.items()})

    def forward(self, hidden: torch.Tensor, dense: dict, pooled: dict) -> tuple[torch.Tensor, dict[str, float]]:
        """`hidden` [B, 37, D] of the last layer -> summed loss and accuracy per label."""
        hidden = self.norm(hidden)
        patches, cls = hidden[:, 1:], hidden[:, 0]
        seen, _ = self.attention(self.queries.expand(len(hidden), -1, -1), patches, patches, need_weights=False)
        loss = hidden.new_zeros(())
        accuracy: dict[str, float] = {}
        for name, head in self.dense.items():
            loss = loss + self._score(head(patches).flatten(0, 1), dense[name].flatten(), name, accuracy)
        for index, (name, head) in enumerate(self.pooled.items()):
            weight = 0.2 if name.startswith("count_") else 1.0
            loss = loss + weight * self._score(head(seen[:, index]), pooled[name], name, accuracy)
            loss = loss + 0.2 * weight * self._score(self.cls[name](cls), pooled[name], "cls_" + name, accuracy)
        return loss, accuracy

    @staticmethod
    def _score(logits: torch.Tensor, target: torch.Tensor, name: str, accuracy: dict[str, float]) -> torch.Tensor:
        known = target != -100
        if not bool(known.any()):
            return logits.sum() * 0
        logits, target = logits[known], target[known]
        accuracy[name] = float((logits.argmax(-1) == target).float().mean())
        return F.cross_entropy(logits, target)


def to_pixels(batch: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
    """uint8 [B, 48, 48, 3] -> normalised float [B, 3, 48, 48], exactly as the saved image processor does it."""
    return (torch.from_numpy(batch).to(device).float().permute(0, 3, 1, 2) / 255 - MEAN) / STD


def train_vision(pool: ScenePool, minutes: float, device: str, batch: int = 48, lr: float = 1.2e-3) -> CLIPVisionModel:
    """Trains the vision tower for `minutes` of wall clock (linear decay by time); returns it in eval mode."""
    torch.manual_seed(0)
    tower = CLIPVisionModel(vision_config()).to(device)
    heads = AttributeHeads(128).to(device)
    optimizer = torch.optim.AdamW(
        [*tower.parameters(), *heads.parameters()], lr=lr, weight_decay=0.05, betas=(0.9, 0.98)
    )
    dense = {k: torch.from_numpy(v).to(device) for k, v in pool.dense.items()}
    pooled = {k: torch.from_numpy(v).to(device) for k, v in pool.pooled.items()}
    rng = np.random.default_rng(1)
    started, step = time.time(), 0
    average: dict[str, float] = {}
    while (spent := (time.time() - started) / (60 * minutes)) < 1:
        rows = rng.integers(len(pool.scenes), size=batch)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 100) * min(1.0, 1.6 * (1 - spent) + 0.01)
        pixels = to_pixels(pool.pixels[rows], device)
        pixels = pixels + 0.04 * torch.randn_like(pixels)
        hidden = tower(pixel_values=pixels).last_hidden_state
        index = torch.from_numpy(rows).to(device)
        loss, accuracy = heads(
            hidden, {k: v[index] for k, v in dense.items()}, {k: v[index] for k, v in pooled.items()}
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        for name, value in accuracy.items():
            average[name] = 0.98 * average.get(name, value) + 0.02 * value
        step += 1
        if step % 250 == 0:
            shown = " ".join(f"{k}={average[k]:.2f}" for k in average if "count_" not in k and "cls_" not in k)
            print(f"vision step {step} {100 * spent:.0f}% loss {loss.item():.2f} {shown}", flush=True)
    return tower.eval()


@torch.no_grad()
def encode(
    tower: CLIPVisionModel, pixels: np.ndarray, device: str, batch: int = 512
) -> tuple[torch.Tensor, torch.Tensor]:
    """Frozen features: patches [N, 36, D] float16 (last layer, no CLS) and the pooled output [N, D] float32."""
    patches, pooled = [], []
    for start in range(0, len(pixels), batch):
        out = tower(pixel_values=to_pixels(pixels[start : start + batch], device))
        patches.append(out.last_hidden_state[:, 1:].half().cpu())
        pooled.append(out.pooler_output.float().cpu())
    return torch.cat(patches), torch.cat(pooled)
