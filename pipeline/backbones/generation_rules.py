"""Logits processors for greedy decoding, as a checkpoint's generation_config.json asks for them.

The processors are transformers' public classes, assembled here because `generate` does so in a private method. Rules
that depend on an answer's length (minimum length, forced last token) are applied by the decoder, because the rows of a
batch have different lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.generation import (
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    GenerationConfig,
    InfNanRemoveLogitsProcessor,
    LogitsProcessorList,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from pipeline.errors import UserError


def generation_rules(
    settings: GenerationConfig, stops: Sequence[int], device: torch.device | str
) -> LogitsProcessorList:
    """Processors of scores [B, V] given the tokens [B, n] generated so far, in transformers' order.

    These tokens do not include the prompt, which enters the model as embeddings. Raises UserError for a setting that
    greedy decoding from embeddings does not support.
    """
    asked = _asked(settings)
    for name in ("guidance_scale", "watermarking_config"):
        if asked(name):
            raise UserError(
                f"generation_config.json of the model sets {name} to {asked(name)}, which greedy decoding from "
                "embeddings does not support. Expected it to be left out."
            )
    stop_list, rules = list(stops), LogitsProcessorList()
    if asked("sequence_bias"):
        rules.append(SequenceBiasLogitsProcessor(asked("sequence_bias")))
    if asked("repetition_penalty"):
        rules.append(RepetitionPenaltyLogitsProcessor(asked("repetition_penalty")))
    if asked("no_repeat_ngram_size"):
        rules.append(NoRepeatNGramLogitsProcessor(asked("no_repeat_ngram_size")))
    if asked("bad_words_ids"):
        rules.append(NoBadWordsLogitsProcessor(asked("bad_words_ids"), stop_list))
    begin = 0
    if settings.forced_bos_token_id is not None:
        rules.append(ForcedBOSTokenLogitsProcessor(settings.forced_bos_token_id))
        begin = 1
    if settings.remove_invalid_values is True:
        rules.append(InfNanRemoveLogitsProcessor())
    if asked("exponential_decay_length_penalty"):
        rules.append(ExponentialDecayLengthPenalty(asked("exponential_decay_length_penalty"), stop_list, 0))
    if asked("suppress_tokens"):
        rules.append(SuppressTokensLogitsProcessor(asked("suppress_tokens"), device=str(device)))
    if asked("begin_suppress_tokens"):
        rules.append(SuppressTokensAtBeginLogitsProcessor(asked("begin_suppress_tokens"), begin, device=str(device)))
    return rules


# Values that have no effect, besides None, 0 and empty lists.
NEUTRAL: dict[str, Any] = {"repetition_penalty": 1.0, "guidance_scale": 1.0}


def _asked(settings: GenerationConfig) -> Any:
    """A function that returns the value of a setting by name, None where it has no effect."""

    def value(name: str) -> Any:
        found = getattr(settings, name, None)
        return None if not found or found == NEUTRAL.get(name) else found

    return value
