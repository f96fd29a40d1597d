"""A folder of recorded reference results (layout: folder modalprompt/ of the fixtures) as our own samples and sets.

Nothing here knows a size: prompt length, tasks, keys, batch and image come from the folder.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.data.collate import Examples
from pipeline.data.conversation import Conversation
from pipeline.data.example import Example
from pipeline.data.keys import Keys
from pipeline.data.sample import Sample
from pipeline.data.sample_list import SampleList
from pipeline.data.stage_data import StageData
from pipeline.prompts.heads import ProjectionHead
from pipeline.prompts.pool import PromptPool
from tests import tiny

IMAGE_MARK = -200  # one place in the recorded ids stands for all image tokens
HEAD = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
REFERENCE_K = 3
Case = dict[str, Tensor]


class Recorded:
    """One folder: `train` and `infer` hold its cases by the 1-based task number."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text("utf-8"))
        self.inputs = load_file(folder / "inputs.safetensors")
        self.train, self.infer = self._cases("train_task"), self._cases("infer_task")
        self.samples = len(self.inputs["input_ids"])
        first = next(iter(self.train.values()))
        self.tasks, self.prompt_length, self.width = first["prompts"].shape
        self.key_width = self.inputs["image_key"].shape[1]

    def _cases(self, kind: str) -> dict[int, Case]:
        found = {int(p.stem.removeprefix(kind)): load_file(p) for p in self.folder.glob(f"{kind}*.safetensors")}
        assert found, f"{self.folder} holds no {kind}*.safetensors"
        return dict(sorted(found.items()))

    @property
    def k(self) -> int:
        """The most sets the reference inserts: the current one and as many earlier ones as it recorded."""
        return max((c["top_previous"].shape[1] + 1 for c in self.train.values() if "top_previous" in c), default=0) or (
            max((c["top"].shape[1] for c in self.infer.values()), default=REFERENCE_K)
        )

    def start(self, task: int) -> dict[str, Tensor]:
        """The trainables that training of `task` (1-based) starts from, as our engine names them."""
        case = self.train[task]
        heads = {f"head.{name}": case[f"head.{name}"][task - 1] for name in HEAD}
        return {"prompt": case["prompts"][task - 1], **heads}

    @torch.no_grad()
    def pool(self, case: Case, sets: int) -> PromptPool:
        """The first sets of a training case, with the prototypes our head gives them."""
        pool = PromptPool()
        for number in range(sets):
            head = ProjectionHead(self.width, self.key_width)
            head.load_state_dict({name: case[f"head.{name}"][number] for name in HEAD})
            prompt = case["prompts"][number]
            pool.append(f"task{number + 1}", {"prompt": prompt}, {"prototype": head(prompt)})
        if not sets:
            none = torch.zeros(0, self.prompt_length, self.width), torch.zeros(0, self.key_width)
            return PromptPool.of_prompts([], *none)
        return pool

    def save_model(self, target: Path) -> Path:
        """The recorded checkpoint in `target`, completed by a processor, as our loader expects it."""
        shutil.copytree(self.folder / "llava_tiny", target, copy_function=shutil.copyfile)
        target.chmod(0o755)
        vision = json.loads((target / "config.json").read_text("utf-8"))["vision_config"]
        tiny.save_processor(target, vision["image_size"], vision["patch_size"])
        return target

    def examples(self, processor: Any, image_token: int, image_tokens: int) -> Examples:
        """The recorded samples, tokenised."""
        has_image = (self.inputs["input_ids"] == IMAGE_MARK).any(dim=1)
        keys = Keys(self.inputs["image_key"], self.inputs["text_key"], has_image, {})
        samples = SampleList(Sample(f"s{number}", None, "", "") for number in range(self.samples))
        rows = [self._example(number, image_token, image_tokens) for number in range(self.samples)]
        return _RecordedExamples(StageData([(samples, keys, None)]), _TokensAsText(processor, 1 << 20), rows)

    def _example(self, number: int, image_token: int, image_tokens: int) -> Example:
        """One sample with its image mark replaced by the image tokens of our models."""
        kept = self.inputs["attention_mask"][number].bool()
        ids, labels = self.inputs["input_ids"][number][kept].tolist(), self.inputs["labels"][number][kept].tolist()
        answer = next((place for place, label in enumerate(labels) if label != -100), len(labels))
        assert labels[answer:] == ids[answer:], "the answer is not the end of the sample"
        prompt: list[int] = []
        for token in ids[:answer]:
            prompt += [image_token] * image_tokens if token == IMAGE_MARK else [token]
        pixels = self.inputs["pixel_values"][number] if IMAGE_MARK in ids else None
        images = None if pixels is None else {"pixel_values": pixels[None]}
        return Example(f"s{number}", prompt, ids[answer:], images)


class _TokensAsText(Conversation):
    """Decodes to the token ids themselves, so that a test of generated text is one of generated tokens."""

    def decode(self, tokens: list[int]) -> str:
        return json.dumps(tokens)


class _RecordedExamples(Examples):
    def __init__(self, data: StageData, conversation: Conversation, rows: list[Example]) -> None:
        super().__init__(data, conversation)
        self.rows = rows

    def __getitem__(self, index: int) -> Example:
        return self.rows[index]
