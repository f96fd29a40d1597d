"""Tokenises a sample with the model's processor: the prompt by its chat template, and the answers that are learned.

One file because tokenising prompt, answer, further turns and image depends on the same template: the tokens of
each depend on the text before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from pipeline.data.example import Example, Length, picture_digest
from pipeline.data.image_sizes import ImageShape, ImageSizes, image_sizes
from pipeline.data.pictures import SQUARE_SIDE, squared
from pipeline.data.plain_text import PlainText
from pipeline.data.sample import Sample
from pipeline.data.truncation import cut_to_fit
from pipeline.errors import UserError

# Name of an image's stored features among its inputs, in place of its pixels (see `kept_features`).
KEPT = "kept_features"
PLAIN = Image.new("RGB", (32, 32), (1, 1, 1))
# LLaVA-1.5's conversation "v1" (after Vicuna 1.1).
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
MARK = "\N{OBJECT REPLACEMENT CHARACTER}"  # stands for an answer; no template changes it and no question has it
PLACE = "\ue000"  # stands for a question
TOO_LONG = ("refuse", "skip", "truncate")


class Conversation:
    """Makes examples from samples with a model's processor."""

    def __init__(
        self,
        processor: Any,
        max_length: int,
        template: str = "auto",
        image_padding: str = "none",
        cuts: bool = False,
    ) -> None:
        """Prepare the template and the blank image.

        Args:
            processor: the model's processor.
            max_length: longest example in tokens.
            template: auto: the processor's chat template, else LLaVA-1.5's without its system prompt; vicuna_v1:
                LLaVA-1.5's with its system prompt.
            image_padding: square: pad images to squares with the processor's mean colour, as LLaVA's own code does;
                stretch: resize them whole to the one size that the model sees.
            cuts: shorten samples of more than `max_length` tokens (see `cut_to_fit`) instead of refusing them.
        """
        self.processor = processor
        self.cuts = cuts
        self.tokenizer = processor.tokenizer
        self.max_length = max_length
        self.padded = image_padding == "square"
        self.stretched = self._one_size() if image_padding == "stretch" else None  # height and width in pixels
        self.image_token: str = processor.image_token
        self.system = VICUNA_SYSTEM if template == "vicuna_v1" else ""
        self.templated = template == "auto" and bool(getattr(processor, "chat_template", None))
        self.end_text, self.end_token = self._end_of_answer()
        self.plain = PlainText(self.tokenizer, (self.image_token,))
        self.blank = self._blank()

    @cached_property
    def image_number(self) -> int:
        """The number of the image token."""
        return self.tokenizer.convert_tokens_to_ids(getattr(self.tokenizer, "image_token", None) or self.image_token)

    def text(self, question: str, has_image: bool) -> str:
        """The prompt as text, ready for the answer."""
        return self._text([question], has_image, "")

    def _text(self, questions: Sequence[str], has_image: bool, answer: str) -> str:
        """The conversation up to the answer to the last question, with `answer` as the answers to the earlier ones."""
        questions = [self.bare(question) for question in questions]
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

    def bare(self, question: str) -> str:
        """A question without the image's placeholder at its ends, because the template places the image."""
        return question.strip().removeprefix(self.image_token).removesuffix(self.image_token).strip()

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        return self.processor.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)

    def _end_of_answer(self) -> tuple[str, int]:
        """The special token that ends an answer, as text and number: from the chat template, else the tokenizer's."""
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

        With stored `features` [tokens, width] the image is not decoded; all images have the same number of tokens then.
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
        """Tokenise one sample with its decoded image; raises UserError when it is too long."""
        images: dict[str, Tensor] | None = None
        if picture is None:
            prompt = self._prompt(sample.question, False, self.tokenizer)
        else:
            given = self._given(picture)
            try:
                prompt, inputs = self._with_image(sample.question, given)
            except Exception:
                self._require_image(sample.id, given)  # raises UserError if the image is the cause
                raise
            images = self._image_inputs(inputs) if features is None else {KEPT: features[None]}
        answer, learned = self._answer_and_turns(sample, picture is not None)
        if len(prompt) + len(answer) > self.max_length:
            size = None if picture is None else picture.size
            if self.cuts:
                return self.example_of(self.cut(sample, size), picture, features)
            raise self.too_long(sample.id, len(prompt) + len(answer))
        return Example(sample.id, prompt, answer, images, learned, picture_digest(sample.image))

    def _with_image(self, question: str, picture: Image.Image) -> tuple[list[int], Any]:
        """The tokens of the prompt and the processor's tensors of its image."""
        if self.sizes.one_size is None:

            def with_image(text: str, **options: Any) -> Any:
                return self.processor(images=picture, text=text, return_tensors="pt", **self.sizes.options, **options)

            return self._prompt_and_inputs(question, with_image)
        # Every image takes as many tokens, so text and image need not go through the processor together, whose merging
        # and checking of arguments takes longer than both.
        tokens, number = [], self.image_number
        for token in self._prompt(question, True, self.tokenizer):
            tokens += [token] * (self._tokens_per_image if token == number else 1)
        return tokens, self.processor.image_processor(picture, return_tensors="pt")

    @cached_property
    def _tokens_per_image(self) -> int:
        """Tokens of every image, where the model takes images in one size."""
        return self.image_shape(*PLAIN.size).tokens

    def too_long(self, name: str, tokens: int) -> UserError:
        """The error for a sample of more than `max_length` tokens."""
        return UserError(
            f"Sample '{name}' has {tokens} tokens, more than the {self.max_length} of model.max_length. Raise "
            "model.max_length, lower model.image_tokens where its image takes most of them, or set data.too_long to "
            "skip or truncate."
        )

    def cut(self, sample: Sample, size: tuple[int, int] | None) -> Sample:
        """The sample shortened to `max_length` tokens; UserError where shortening its text does not suffice."""
        fitting = cut_to_fit(sample, lambda shorter: self.length(shorter, size).all, self.max_length)
        if fitting is None:
            length = self.length(sample, size)
            raise UserError(
                f"Sample '{sample.id}' has {length.all} tokens, more than the {self.max_length} of model.max_length, "
                f"and no cut of its question is enough: its image takes {length.image}, its answer {length.answer}. "
                "Raise model.max_length, or lower model.image_tokens."
            )
        return fitting

    def length(self, sample: Sample, size: tuple[int, int] | None) -> Length:
        """The numbers of tokens of the sample's example, computed from its texts and its image's (width, height).

        `size` is None without an image. Raises UserError for a size that the processor refuses.
        """
        shape = None if size is None else self.image_shape(*size, name=sample.id)

        def lean(text: str, **options: Any) -> Any:
            return self.tokenizer(text if shape is None else text.replace(self.image_token, shape.text, 1), **options)

        prompt = len(self._prompt(sample.question, shape is not None, lean))
        image = 0 if shape is None else shape.tokens
        answer, _ = self._answer_and_turns(sample, shape is not None)
        return Length(prompt + (0 if shape is None else image - shape.runs), len(answer), image)

    @cached_property
    def sizes(self) -> ImageSizes:
        """The processor's numbers of tokens and crops by image size."""
        return image_sizes(self.processor)

    def image_shape(self, width: int, height: int, name: str = "") -> ImageShape:
        """Tokens and crops of an image of this size; UserError, with the sample's name, where the processor refuses."""
        if self.padded:
            width = height = min(max(width, height), SQUARE_SIDE)
        try:
            return self.sizes.of(width, height)
        except (ValueError, ZeroDivisionError) as error:
            raise self._not_processed(name, (width, height), error) from error

    def _require_image(self, name: str, picture: Image.Image) -> None:
        """UserError, with the sample's name, for an image that the processor refuses."""
        try:
            self.processor.image_processor(picture, return_tensors="pt")
        except Exception as error:  # processors raise different errors
            raise self._not_processed(name, picture.size, error) from error

    def _not_processed(self, name: str, size: tuple[int, int], error: Exception) -> UserError:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return UserError(
            f"The model's processor cannot use the image of sample '{name}', {size[0]} x {size[1]} pixels ({said}). "
            "Set data.too_long to skip, or replace the image."
        )

    def _prompt(self, question: str, has_image: bool, tokenise: Callable[..., Any]) -> list[int]:
        return self._prompt_and_inputs(question, tokenise, has_image)[0]

    def _prompt_and_inputs(
        self, question: str, tokenise: Callable[..., Any], has_image: bool = True
    ) -> tuple[list[int], Any]:
        """The tokens of the prompt, and the output of `tokenise` for the part with the image."""
        text, special = self.text(question, has_image), self.plain.holds_special(self.bare(question))
        before, after = text, ""
        if special:
            before, _, after = self.text(PLACE, has_image).partition(PLACE)
        # A template may contain the first token, which the tokenizer would add again.
        first, options = self.tokenizer.bos_token, {}
        if first is not None and text.startswith(first):
            options["add_special_tokens"] = False
        inputs = tokenise(before, **options)
        prompt = torch.as_tensor(inputs["input_ids"]).flatten().tolist()
        if first is not None and prompt[:1] != [self.tokenizer.bos_token_id]:
            prompt = [self.tokenizer.bos_token_id, *prompt]
        if special:
            prompt += self.plain(self.bare(question))
            prompt += list(self.tokenizer(after, add_special_tokens=False).input_ids)
        return prompt, inputs

    def answer(self, sample: Sample, has_image: bool) -> list[int]:
        """Tokens of a sample's first answer, with the end token."""
        return self._answer(self.text(sample.question, has_image), sample.answer)

    def _answer_and_turns(self, sample: Sample, has_image: bool) -> tuple[list[int], list[bool] | None]:
        answer = self.answer(sample, has_image)
        return self._with_turns(sample, answer, has_image) if sample.meta.get("turns") else (answer, None)

    def _answer(self, prompt: str, answer: str) -> list[int]:
        """Tokens of the answer as they follow the prompt, with the end token."""
        answer = answer.strip()
        if self.plain.holds_special(answer):
            answer = answer.removesuffix(self.end_text).rstrip()  # some datasets end answers with the end token as text
        joined = ("" if prompt[-1:].isspace() else " ") + answer
        if self.plain.holds_special(answer):
            return [*self.plain(joined), self.end_token]
        before = list(self.tokenizer(prompt).input_ids)
        whole = list(self.tokenizer(prompt + joined).input_ids)
        if whole[: len(before)] == before:
            tokens = whole[len(before) :]
        else:  # a token spans prompt and answer; at inference the prompt is tokenised alone, so split it there
            tokens = list(self.tokenizer(joined, add_special_tokens=False).input_ids)
        return tokens if tokens[-1:] == [self.end_token] else [*tokens, self.end_token]

    def _with_turns(self, sample: Sample, answer: list[int], has_image: bool) -> tuple[list[int], list[bool]]:
        """Tokens of the first answer and of the further questions and answers, and which tokens belong to answers."""
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
            asked = self._asked(between, questions, has_image)
            answered = self._answer(between, turn["answer"])
            answer = [*answer, *asked, *answered]
            learned += [False] * len(asked) + [True] * len(answered)
        return answer, learned

    def _asked(self, between: str, questions: Sequence[str], has_image: bool) -> list[int]:
        """Tokens of the last of these questions with the template's text before and after it."""
        question = self.bare(questions[-1])
        if not self.plain.holds_special(question):
            return list(self.tokenizer(between, add_special_tokens=False).input_ids)
        text = self._text([*questions[:-1], PLACE], has_image, MARK).split(MARK)[-1].lstrip(" ")
        before, _, after = text.removeprefix(self.end_text).partition(PLACE)
        ends = [self.tokenizer(part, add_special_tokens=False).input_ids if part else [] for part in (before, after)]
        return [*ends[0], *self.plain(question), *ends[1]]

    def _given(self, picture: Image.Image) -> Image.Image:
        """The picture for the processor: padded to a square with the mean colour, stretched, or as it is."""
        if self.stretched is not None:
            return picture.resize(self.stretched[::-1], Image.Resampling.BICUBIC)
        if not self.padded:
            return self.sizes.prepared(picture)
        return squared(picture, tuple(int(255 * value) for value in self.processor.image_processor.image_mean))

    def _one_size(self) -> tuple[int, int]:
        size = self.sizes.one_size
        if size is None:
            raise UserError(
                "model.image_padding is stretch, and this model takes images in their own shape or in several crops; "
                "expected a llava or a fast_vlm. Set it to none."
            )
        return size

    def _blank(self) -> dict[str, Tensor]:
        """Inputs of a blank image for batches without one; one crop unless the model needs the number of crops."""
        blank = self._image_inputs(self.processor.image_processor(self._given(PLAIN), return_tensors="pt"))
        if self.sizes.counts_crops:
            return blank
        return {name: value[:1] for name, value in blank.items()}

    def _image_inputs(self, outputs: Any) -> dict[str, Tensor]:
        """The processor's tensors of one image, crops [crops, 3, H, W] and their masks, without an image dimension."""
        found = {name: torch.as_tensor(outputs[name]) for name in self.sizes.inputs if name in outputs}
        for name, plain in (("pixel_values", 4), ("pixel_attention_mask", 3)):
            if name in found and found[name].dim() > plain:
                found[name] = found[name].flatten(0, 1)
        if "pixel_attention_mask" in found:
            found["pixel_attention_mask"] = found["pixel_attention_mask"].bool()
        return found

    def decode(self, tokens: list[int]) -> str:
        """The text of generated tokens up to the end token."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()
