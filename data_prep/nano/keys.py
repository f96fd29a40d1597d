"""Trains the CLIP for routing keys: a small text tower whose space is shared with the frozen vision tower's output.

Training is contrastive, on pairs of an image and a description of it or a question about it. Two auxiliary classifiers,
which are dropped afterwards, separate families of images and kinds of text in the shared space.
"""

from __future__ import annotations

import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionModel, PreTrainedTokenizerFast

from data_prep.nano.scenes import FAMILIES, Scene
from data_prep.nano.skills import FILLER, SKILLS, WORDINGS, asks, caption

JOINT = 64  # width of the shared space


def clip_config(vision: CLIPVisionModel, tokenizer: PreTrainedTokenizerFast) -> CLIPConfig:
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=JOINT,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act="relu",
        projection_dim=JOINT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPConfig(text_config=text.to_dict(), vision_config=vision.config.to_dict(), projection_dim=JOINT)


# Words that a CLIP trained on web data would associate with a skill. Training texts mix them with filler words in
# random order, so that this CLIP learns what the words are about without seeing a wording of a task.
CONCEPTS = {
    "colour_of": "colour paint painted paints hue tint dye ink".split(),
    "shape_of": "shape form figure outline kind sort".split(),
    "count_all": "count number crowd group many large big size total".split(),
    "box_of": "box frame framed tight tightly mark place region".split(),
    "letters": "letters text spell word written".split(),
    "digit": "digit number handwritten figure".split(),
    "tallest": "tallest bar chart highest longest".split(),
}
DESCRIPTION, CHATTER = len(SKILLS), len(SKILLS) + 1  # kinds of text besides the skills; chatter is filler alone


def _filler(rng: np.random.Generator, low: int, high: int) -> list[str]:
    return [FILLER[int(i)] for i in rng.integers(len(FILLER), size=int(rng.integers(low, high)))]


def _text(scene: Scene, rng: np.random.Generator) -> tuple[str, int]:
    """A text for a scene and its kind: a description, a question, filler with words of a concept, or filler alone."""
    draw = rng.random()
    if draw < 0.3:
        return caption(scene), DESCRIPTION
    if draw < 0.45:
        return " ".join(_filler(rng, 3, 9)) + ".", CHATTER
    found = asks(scene, rng)
    if draw < 0.8:
        found = [ask for ask in found if ask.skill in CONCEPTS]
        ask = found[int(rng.integers(len(found)))]
        words = _filler(rng, 1, 6)
        for _ in range(int(rng.integers(1, 3))):
            concept = CONCEPTS[ask.skill]
            words.insert(int(rng.integers(len(words) + 1)), concept[int(rng.integers(len(concept)))])
        if ask.subject:
            words.insert(int(rng.integers(len(words) + 1)), f"the {ask.subject}")
        return " ".join(words) + ("?" if rng.random() < 0.5 else "."), SKILLS.index(ask.skill)
    ask = found[int(rng.integers(len(found)))]
    wordings = WORDINGS[ask.skill]
    return wordings[int(rng.integers(len(wordings)))].format(s=ask.subject), SKILLS.index(ask.skill)


class Directions(nn.Module):
    """An auxiliary classifier by cosine; its low scale and margin ask for large angles between classes."""

    SCALE, MARGIN = 8.0, 0.2

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, JOINT))

    def forward(self, unit: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        cosines = unit @ F.normalize(self.weight, dim=-1).T
        return F.cross_entropy(self.SCALE * (cosines - self.MARGIN * F.one_hot(target, len(self.weight))), target)


def train_keys(
    vision: CLIPVisionModel,
    pooled: torch.Tensor,
    scenes: list[Scene],
    tokenizer: PreTrainedTokenizerFast,
    minutes: float,
    device: str,
    batch: int = 192,
    lr: float = 2e-3,
) -> CLIPModel:
    """Trains the text tower and both projections, with the vision tower frozen.

    Args:
        vision: the trained vision tower.
        pooled: its pooled outputs [N, D] for the scenes.
        scenes: N scenes, for texts about them.
        tokenizer: the CLIP's tokenizer.
        minutes: wall clock time.
        device: where to train.
        batch: pairs per step.
        lr: highest learning rate.
    """
    torch.manual_seed(0)
    clip = CLIPModel(clip_config(vision, tokenizer))
    # Versions of transformers differ in whether the tower's weights have the prefix.
    state = {name.removeprefix("vision_model."): value for name, value in vision.state_dict().items()}
    clip.vision_model.load_state_dict(state)
    clip.to(device)
    of_image, of_text = Directions(len(FAMILIES)).to(device), Directions(CHATTER + 1).to(device)
    parts = (clip.visual_projection, clip.text_model, clip.text_projection, of_image, of_text)
    trained = [p for part in parts for p in part.parameters()] + [clip.logit_scale]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.05, betas=(0.9, 0.98))
    rng = np.random.default_rng(2)
    family = torch.tensor([FAMILIES.index(s.family) for s in scenes])
    started, step = time.time(), 0
    while (spent := (time.time() - started) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 50) * min(1.0, 2.0 * (1 - spent) + 0.01)
        rows = rng.integers(len(scenes), size=batch)
        drawn = [_text(scenes[int(row)], rng) for row in rows]
        tokens = tokenizer([text for text, _ in drawn], padding=True, return_tensors="pt").to(device)
        kind = torch.tensor([kind for _, kind in drawn], device=device)
        hidden = clip.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
        text = F.normalize(clip.text_projection(hidden), dim=-1)
        image = F.normalize(clip.visual_projection(pooled[torch.from_numpy(rows)].to(device)), dim=-1)
        told = kind != CHATTER  # filler alone describes no image, so it is left out of the contrastive loss
        logits = clip.logit_scale.exp().clamp_max(50) * image[told] @ text[told].T
        same = torch.arange(len(logits), device=device)
        loss = (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 4
        loss = loss + of_text(text, kind) + of_image(image, family[torch.from_numpy(rows)].to(device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            hit = (logits.argmax(-1) == same).float().mean()
            print(
                f"keys step {step} {100 * spent:.0f}% loss {loss.item():.2f} matched {100 * hit:.0f} %",
                flush=True,
            )
    return clip.eval()
