"""What a checkpoint's generation_config.json changes about the scores of the next token, for greedy decoding.

The processors are transformers' public ones. Its own `generate` puts them together in a private method, which takes a
whole configuration with private fields; what depends on an answer's own length (its fewest tokens, a token at its end)
is applied by the decoder, because rows of one batch have different lengths.
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
    """The changes to scores [B, V], in transformers' order, given the tokens [B, n] generated so far.

    The prompt is not among these tokens: it enters the model as embeddings. Raises UserError for a setting that greedy
    decoding from embeddings cannot honour.
    """
    asked = _asked(settings)
    for name in ("guidance_scale", "watermarking_config"):
        if asked(name):
            raise UserError(
                f"generation_config.json of the model sets {name} to {asked(name)}, which is not done here: answers "
                "are greedy and made from embeddings. Expected it to be left out."
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


# Values besides None, 0 and empty lists that change nothing.
NEUTRAL: dict[str, Any] = {"repetition_penalty": 1.0, "guidance_scale": 1.0}


def _asked(settings: GenerationConfig) -> Any:
    """A function of a setting's name: its value, None where it changes nothing."""

    def value(name: str) -> Any:
        found = getattr(settings, name, None)
        return None if not found or found == NEUTRAL.get(name) else found

    return value
