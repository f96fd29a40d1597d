"""From a sample to tokens: the prompt in the model's own form of conversation, and the answers that are learned."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from pipeline.data.pictures import squared
from pipeline.data.sample import Sample
from pipeline.errors import UserError

CACHE_BYTES = 256 << 20
# What processors make of an image: pixels, and what some models have to know about them.
IMAGE_INPUTS = ("pixel_values", "pixel_attention_mask", "image_sizes", "image_grid_thw")
# In their place, what the vision tower made of the image before (see `kept_features`).
KEPT = "kept_features"
PLAIN = Image.new("RGB", (32, 32), (1, 1, 1))
# LLaVA-1.5's conversation "v1" (after Vicuna 1.1).
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
MARK = "\N{OBJECT REPLACEMENT CHARACTER}"  # an answer that no template changes and no question holds


@dataclass(frozen=True)
class Example:
    """A tokenised sample: `prompt` (first token, image tokens, question) and `answer` (with the end token).

    Further turns follow in `answer`; `learned` then marks its tokens that are answers.
    """

    id: str
    prompt: list[int]
    answer: list[int]
    images: dict[str, Tensor] | None  # of IMAGE_INPUTS those the model has; crops or patches in the first dimension
    learned: list[bool] | None = None
    picture: bytes = b""  # digest of the image file: equal for equal images, empty without one

    @property
    def labels(self) -> list[int]:
        """What is learned of `answer`: its tokens, -100 for those of further questions."""
        if self.learned is None:
            return self.answer
        return [token if learn else -100 for token, learn in zip(self.answer, self.learned, strict=True)]

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in memory."""
        pixels = sum(value.nbytes for value in (self.images or {}).values())
        return pixels + 36 * (len(self.prompt) + len(self.answer))  # a Python int in a list: 28 + 8 bytes


class Conversation:
    """Turns samples into examples with a model's processor.

    `template` auto is the processor's chat template, else LLaVA-1.5's form without its system sentence; vicuna_v1 is
    LLaVA-1.5's whole form. `image_padding` square pads images to squares with the processor's mean colour, as LLaVA's
    own code does.
    """

    def __init__(self, processor: Any, max_length: int, template: str = "auto", image_padding: str = "none") -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.max_length = max_length
        self.padded = image_padding == "square"
        self.image_token: str = processor.image_token
        self.system = VICUNA_SYSTEM if template == "vicuna_v1" else ""
        self.templated = template == "auto" and bool(getattr(processor, "chat_template", None))
        self.end_text, self.end_token = self._end_of_answer()
        self.blank = self._blank()

    @property
    def image_number(self) -> int:
        """The token that stands for image features."""
        return self.tokenizer.convert_tokens_to_ids(getattr(self.tokenizer, "image_token", None) or self.image_token)

    def text(self, question: str, has_image: bool) -> str:
        """The prompt as text, ready for the answer."""
        return self._text([question], has_image, "")

    def _text(self, questions: Sequence[str], has_image: bool, answer: str) -> str:
        """The conversation up to the answer to the last question; the earlier ones are answered `answer`."""
        questions = [question.replace(self.image_token, "").strip() for question in questions]  # the template places it
        if not self.templated:
            image = f"{self.image_token}\n" if has_image else ""
            between = f" {answer}{self.end_text}USER: "
            return f"{self.system}USER: {image}" + between.join(f"{question} ASSISTANT:" for question in questions)
        messages: list[dict[str, Any]] = []
        for number, question in enumerate(questions):
            if number:
                messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
            image_part = [{"type": "image"}] if has_image and not number else []
            messages.append({"role": "user", "content": [*image_part, {"type": "text", "text": question}]})
        return self._render(messages, add_generation_prompt=True)

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        return self.processor.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)

    def _end_of_answer(self) -> tuple[str, int]:
        """The special token that ends an answer, as text and number: the template's, else the tokenizer's."""
        tokenizer = self.tokenizer
        if self.templated:
            turns = (("user", "?"), ("assistant", MARK))
            messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
            rest = self._render(messages, add_generation_prompt=False).partition(MARK)[2].lstrip()
            added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
            found = max((token for token in added if rest.startswith(token)), key=len, default=None)
            if found is not None:
                return found, added[found]
        return tokenizer.eos_token, tokenizer.eos_token_id

    def example(self, sample: Sample, features: Tensor | None = None) -> Example:
        """Tokenise one sample; raises UserError when it is too long or its image is damaged.

        With kept `features` [tokens, width] the image is not decoded: any image has as many tokens then.
        """
        try:
            picture = sample.picture() if features is None else PLAIN
        except Exception as error:
            raise UserError(
                f"The image of sample '{sample.id}' cannot be decoded ({error}). "
                "Mend or remove it and run `python -m pipeline prepare RECIPE` again."
            ) from error
        return self.example_of(sample, picture, features)

    def example_of(self, sample: Sample, picture: Image.Image | None, features: Tensor | None = None) -> Example:
        """Tokenise one sample whose image is decoded already; raises UserError when it is too long."""
        text = self.text(sample.question, picture is not None)
        # A template may already begin with the first token, which the tokenizer would add once more.
        first, options = self.tokenizer.bos_token, {}
        if first is not None and text.startswith(first):
            options["add_special_tokens"] = False
        if picture is None:
            prompt, images = list(self.tokenizer(text, **options).input_ids), None
        else:
            inputs = self.processor(images=self._pad(picture), text=text, return_tensors="pt", **options)
            prompt = inputs["input_ids"][0].tolist()
            images = image_inputs(inputs) if features is None else {KEPT: features[None]}
        if first is not None and prompt[:1] != [self.tokenizer.bos_token_id]:
            prompt = [self.tokenizer.bos_token_id, *prompt]
        answer, learned = self._answer(text, sample.answer), None
        if sample.meta.get("turns"):
            answer, learned = self._with_turns(sample, answer, picture is not None)
        if len(prompt) + len(answer) > self.max_length:
            raise UserError(
                f"Sample '{sample.id}' has {len(prompt) + len(answer)} tokens, more than the {self.max_length} of "
                "model.max_length. Raise model.max_length or leave the sample out."
            )
        return Example(sample.id, prompt, answer, images, learned, picture_digest(sample.image))

    def _answer(self, prompt: str, answer: str) -> list[int]:
        """Answer tokens as they follow the prompt, with the end token."""
        joined = ("" if prompt[-1:].isspace() else " ") + answer.strip()
        before = list(self.tokenizer(prompt).input_ids)
        whole = list(self.tokenizer(prompt + joined).input_ids)
        if whole[: len(before)] == before:
            tokens = whole[len(before) :]
        else:  # a token spans the border; at inference the prompt is tokenised alone, so the border must hold
            tokens = list(self.tokenizer(joined, add_special_tokens=False).input_ids)
        return tokens if tokens[-1:] == [self.end_token] else [*tokens, self.end_token]

    def _with_turns(self, sample: Sample, answer: list[int], has_image: bool) -> tuple[list[int], list[bool]]:
        """The first answer, then the further questions and answers; and which of the tokens are answers."""
        turns = sample.meta["turns"]
        learned = [True] * len(answer)
        questions = [sample.question]
        for turn in turns:
            questions.append(turn["question"])
            text = self._text(questions, has_image, MARK)
            pieces = text.split(MARK)
            if len(pieces) != len(questions):
                raise UserError(
                    f"Sample '{sample.id}' has {len(turns) + 1} turns, but the model's chat template holds only one. "
                    "Set model.template to vicuna_v1 if the model is a LLaVA, or split the sample."
                )
            between = pieces[-1].lstrip(" ").removeprefix(self.end_text)
            asked = list(self.tokenizer(between, add_special_tokens=False).input_ids)
            answered = self._answer(between, turn["answer"])
            answer = [*answer, *asked, *answered]
            learned += [False] * len(asked) + [True] * len(answered)
        return answer, learned

    def _pad(self, picture: Image.Image) -> Image.Image:
        """The picture in the middle of a square of the processor's mean colour."""
        if not self.padded:
            return picture
        return squared(picture, tuple(int(255 * value) for value in self.processor.image_processor.image_mean))

    def _blank(self) -> dict[str, Tensor]:
        """Stands in where a batch has no image; one crop of it will do, where the model does not count them."""
        blank = image_inputs(self.processor.image_processor(PLAIN, return_tensors="pt"))
        if "image_sizes" in blank or "image_grid_thw" in blank:
            return blank
        return {name: value[:1] for name, value in blank.items()}

    def decode(self, tokens: list[int]) -> str:
        """The text of generated tokens up to the end token."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def picture_digest(image: bytes | None) -> bytes:
    """Equal for equal image files, empty without one."""
    return b"" if image is None else hashlib.blake2b(image, digest_size=16).digest()


def image_inputs(outputs: Any) -> dict[str, Tensor]:
    """What a processor made of one image; crops [crops, 3, H, W] and their masks, without a dimension for the image."""
    found = {name: torch.as_tensor(outputs[name]) for name in IMAGE_INPUTS if name in outputs}
    for name, plain in (("pixel_values", 4), ("pixel_attention_mask", 3)):
        if name in found and found[name].dim() > plain:
            found[name] = found[name].flatten(0, 1)
    if "pixel_attention_mask" in found:
        found["pixel_attention_mask"] = found["pixel_attention_mask"].bool()
    return found


class ExampleCache:
    """The most recently used examples, up to a number of bytes: small images are decoded only once."""

    def __init__(self, limit: int = CACHE_BYTES) -> None:
        self.limit = limit
        self.bytes = 0
        self._examples: OrderedDict[int, Example] = OrderedDict()

    def get(self, index: int) -> Example | None:
        example = self._examples.get(index)
        if example is not None:
            self._examples.move_to_end(index)
        return example

    def put(self, index: int, example: Example) -> None:
        self._examples[index] = example
        self.bytes += example.nbytes
        while self.bytes > self.limit and self._examples:
            _, oldest = self._examples.popitem(last=False)
            self.bytes -= oldest.nbytes
