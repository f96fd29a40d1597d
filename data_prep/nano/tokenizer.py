"""The embedded models' tokenizers (byte-level BPE, trained on questions and answers), processors and templates."""

from __future__ import annotations

from itertools import product
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from data_prep.nano.scenes import COLOURS, LETTERS, MERGED_PAIRS, NUMBERS, SHAPES, SIZE
from data_prep.nano.skills import CASES, FILLER, PREFIXES, SUFFIXES, UNANSWERABLE, WORDINGS, WRAPS, Format
from data_prep.nano.vision import MEAN, PATCH, STD

VOCABULARY = 832
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    " {% else %}ASSISTANT: "
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def _corpus() -> list[str]:
    plain = [*COLOURS, *SHAPES, *NUMBERS, UNANSWERABLE, "0,8,17,25,33,42,50,58,67,75,83,92,100"]
    formats = [
        Format(prefix, case, wrap, suffix) for prefix, case, wrap, suffix in product(PREFIXES, CASES, WRAPS, SUFFIXES)
    ]
    answers = [" " + f.apply(a) for a in plain for f in formats]
    answers += [" " + Format(case=case).apply(a) for a in plain for case in CASES for _ in range(200)]
    questions = [w.format(s=s) for ws in WORDINGS.values() for w in ws for s in (*COLOURS, *SHAPES)] * 20
    turns = [f"USER: \n{q} ASSISTANT:" for q in questions]
    return (
        answers
        + turns
        + [" " + w for w in FILLER] * 3000
        + [" a chart with bars and the letters in written digit"] * 2000
    )


def _byte_level(specials: list[str], size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    return tokenizer


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The language model's tokenizer, in which each letter of a string that images show is a token of its own."""
    tokenizer = _byte_level(["<unk>", "<s>", "</s>", "<pad>", "<image>"], VOCABULARY)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
        padding_side="right",
        model_max_length=512,
    )
    for a, b in product(LETTERS, LETTERS):
        for pair in (a + b, (a + b).lower()):
            if len(wrapped(pair, add_special_tokens=False).input_ids) != 2 and pair.upper() not in MERGED_PAIRS:
                raise ValueError(f"the tokenizer merges {pair!r}; add it to MERGED_PAIRS in scenes.py")
    return wrapped


def build_image_processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
    )


def build_processor() -> LlavaProcessor:
    return LlavaProcessor(
        image_processor=build_image_processor(),
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_clip_tokenizer() -> PreTrainedTokenizerFast:
    """The CLIP's tokenizer: a start and an end token around the text, at most 77 tokens."""
    tokenizer = _byte_level(["<pad>", "<unk>", "<|startoftext|>", "<|endoftext|>"], VOCABULARY)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>", special_tokens=[("<|startoftext|>", 2), ("<|endoftext|>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<pad>",
        model_max_length=77,
    )


def save_processors(llava: Path, clip: Path) -> None:
    build_processor().save_pretrained(llava)
    build_clip_tokenizer().save_pretrained(clip)
    build_image_processor().save_pretrained(clip)
