"""Tiny random CLIP and SigLIP models and a tokenizer of bytes, for tests of prompts in their towers."""

from __future__ import annotations

from typing import Any

CONTEXT = 77
START, END = 256, 257


def byte_tokenizer(context: int = CONTEXT) -> Any:
    """Bytes of the lower-cased text as ids 0 to 255, between a start (256) and an end token (257); padding is 0."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    # The byte alphabet of ByteLevel: printable bytes stand for themselves, the others for signs from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    vocabulary = {chr(byte): byte for byte in printable}
    vocabulary |= {chr(256 + number): byte for number, byte in enumerate(others)}
    vocabulary |= {"<start>": START, "<end>": END}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<start>", "<end>")])
    backend.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", START), ("<end>", END)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<start>", eos_token="<end>", model_max_length=context
    )
    tokenizer.pad_token_id = 0
    return tokenizer
