"""A run or an adapter as a model of lmms-eval, so that its tasks score it: `--model continual_prompts`.

Only lmms-eval imports this module, by the entry point in pyproject.toml; nothing else here needs its package.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lmms_eval.api.model import lmms
from PIL import Image

from pipeline.adapter.answering import Answerer, Question
from pipeline.adapter.load import load_adapter
from pipeline.config.unfamiliar import UNFAMILIAR
from pipeline.errors import UserError, nearest

OPTIONS = ("adapter", "frozen", "clip", "task", "unfamiliar")
# What lmms-eval passes beside the model's own arguments.
PASSED = ("device", "batch_size", "max_batch_size")
# Settings of a task's generation_kwargs, with the values under which decoding is greedy.
GREEDY = {"do_sample": (False, None), "num_beams": (1, None), "temperature": (0, 0.0, None)}
# Settings without effect on greedy decoding, or of other models' inputs.
WITHOUT_EFFECT = ("top_p", "top_k", "use_cache", "image_aspect_ratio", "num_return_sequences", "length_penalty")
READ = ("until", "max_new_tokens", "max_gen_toks")


@dataclass(frozen=True)
class Asked:
    """One request of a task."""

    question: Question
    longest: int | None  # tokens; None: as in the run's evaluation
    until: tuple[str, ...]


class ContinualPrompts(lmms):
    """Answers a task's questions with routed prompt sets.

    Args:
        adapter: folder of an exported adapter, or of a run.
        frozen: folder or Hub id of the frozen model, where the recorded one is not on this machine.
        clip: the same for the CLIP.
        task: for methods that are told the task: which one all questions belong to.
        unfamiliar: what becomes of questions that resemble no task; by default as the method says.
        device: torch's name of a device.
        batch_size: of lmms-eval; the number of questions answered together is chosen here.
        further: anything else, which is refused.

    Raises UserError for arguments that cannot be meant, and as `load_adapter` does.
    """

    is_simple = True

    def __init__(
        self,
        adapter: str = "",
        frozen: str | None = None,
        clip: str | None = None,
        task: str | None = None,
        unfamiliar: str | None = None,
        device: str | None = None,
        **further: Any,
    ) -> None:
        super().__init__()
        unknown = [name for name in further if name not in PASSED]
        if unknown:
            known = ", ".join(OPTIONS)
            raise UserError(f"--model_args has '{unknown[0]}'; expected {known}.{nearest(unknown[0], OPTIONS)}")
        if not adapter:
            raise UserError("--model_args has no adapter; expected adapter=FOLDER, of an exported adapter or a run.")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("continual_prompts runs in one process; start lmms-eval without a launcher.")
        if unfamiliar is not None and unfamiliar not in UNFAMILIAR:
            known = ", ".join(UNFAMILIAR)
            raise UserError(
                f"--model_args has unfamiliar={unfamiliar}; expected {known}.{nearest(unfamiliar, UNFAMILIAR)}"
            )
        self.task = None if task is None else str(task)
        self.answerer: Answerer = load_adapter(str(adapter), frozen, clip, device, unfamiliar)
        self.answerer.source.task_number(self.task)  # raises UserError for an unknown or missing one

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Greedy answers, each ended before the first of its task's stop texts.

        Raises UserError for several images or a video in one question, and for sampling.
        """
        asked = [self._asked(request.args) for request in requests]
        answers = [""] * len(asked)
        for longest in dict.fromkeys(one.longest for one in asked):
            numbers = [number for number, one in enumerate(asked) if one.longest == longest]
            found = self.answerer.answer([asked[number].question for number in numbers], longest)
            for number, answer in zip(numbers, found, strict=True):
                answers[number] = ended(answer.text, asked[number].until)
        for request, text in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args[:2], text)
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Refused."""
        raise UserError(
            "This task compares likelihoods of given answers, and prompt sets learn to write answers: only tasks with "
            "output_type generate_until can be scored."
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refused."""
        raise UserError(
            "This task asks in several rounds, and each question is answered alone: only tasks with output_type "
            "generate_until can be scored."
        )

    def _asked(self, arguments: tuple[Any, ...]) -> Asked:
        """A request as lmms-eval hands it over: context, settings, and how to find its pictures."""
        context, settings, pictures_of, number, task, split = arguments
        pictures = pictures_of(self.task_dict[task][split][number]) if pictures_of is not None else []
        where = f"question {number} of {task}"
        require_greedy(settings, task)
        longest = settings.get("max_new_tokens", settings.get("max_gen_toks"))
        until = settings.get("until") or ()
        stops = (until,) if isinstance(until, str) else tuple(text for text in until if text)
        question = Question(context, encoded(flat(pictures), where), self.task)
        return Asked(question, None if longest is None else int(longest), stops)


def require_greedy(settings: dict[str, Any], task: str) -> None:
    """Raise UserError for a task's generation_kwargs that ask for anything but greedy decoding."""
    for name, value in settings.items():
        if name in GREEDY and value not in GREEDY[name]:
            raise UserError(
                f"{task} sets {name}={value}, and answers here are greedy; pass --gen_kwargs "
                f"{name}={GREEDY[name][0]} to score it so."
            )
        if name not in (*GREEDY, *WITHOUT_EFFECT, *READ):
            raise UserError(f"{task} sets {name}={value} in its generation_kwargs, which has no meaning here.")


def flat(pictures: Any) -> list[Any]:
    """The pictures of a document, which tasks return as one, as a list, or as nested lists."""
    if pictures is None:
        return []
    if isinstance(pictures, list | tuple):
        return [one for part in pictures for one in flat(part)]
    return [pictures]


def encoded(pictures: Sequence[Any], where: str) -> bytes | None:
    """The one picture of a question as the bytes of a PNG; UserError for several, and for anything but a picture."""
    if not pictures:
        return None
    if len(pictures) > 1:
        raise UserError(f"{where} has {len(pictures)} pictures; expected at most one, as the models answer about one.")
    (picture,) = pictures
    if not isinstance(picture, Image.Image):
        raise UserError(f"{where} has a {type(picture).__name__}; expected a picture: there is no video or sound here.")
    stream = io.BytesIO()
    picture.convert("RGB").save(stream, "PNG")
    return stream.getvalue()


def ended(text: str, until: Iterable[str]) -> str:
    """The text before the first of the stop texts."""
    return text[: min((found for stop in until if (found := text.find(stop)) >= 0), default=len(text))]
