"""A tiny random checkpoint of each architecture with its own processor class, in the files its real ones have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests import tiny

SIDE, PATCH = 32, 8
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
ROWS = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]


def byte_tokenizer(special: list[str], bos: str | None, eos: str, pad: str, adds_bos: bool, **extra: str) -> Any:
    """A byte-level tokenizer with these special tokens; `extra` names some of them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, vocabulary[str(bos)])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad, extra_special_tokens=extra or None
    )


def text_config(tokenizer: Any, **changes: Any) -> dict[str, Any]:
    """A decoder of two layers, 32 wide, four heads of which two have keys."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": tiny.HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.15,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
        **changes,
    }


def save(
    folder: Path,
    model: Any,
    config: Any,
    tokenizer: Any,
    images: Any,
    processor: dict[str, Any],
    chat: str,
    backend: str = "",
) -> Path:
    """Write the files that a checkpoint on the Hugging Face hub has."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = model(config).float()
        for parameter in network.parameters():
            if not parameter.any():  # what starts at zero would hide what it does
                torch.nn.init.normal_(parameter, std=0.15)
    network.generation_config.eos_token_id = tokenizer.eos_token_id
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # The hub's files name the class without a backend, or the torchvision one.
    settings = {**images.to_dict(), "image_processor_type": type(images).__name__.removesuffix("Pil") + backend}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    (folder / "processor_config.json").write_text(json.dumps(processor))
    (folder / "chat_template.jinja").write_text(chat)
    return folder


def save_llava(folder: Path) -> Path:
    """LLaVA-1.5, see `tiny`."""
    return tiny.save_llava(folder)


def save_fast_vlm(folder: Path) -> Path:
    """FastVLM with a tiny EfficientNet: 4 x 4 features of an image, and no class token."""
    from transformers import EfficientNetConfig, FastVlmConfig, FastVlmForConditionalGeneration, LlamaConfig
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = tiny.byte_tokenizer()
    side = {"height": SIDE, "width": SIDE}
    vision = EfficientNetConfig(
        image_size=SIDE,
        hidden_size=32,
        patch_size=PATCH,
        hidden_act="relu6",
        width_coefficient=0.025,  # 8 features inside, 1280 times this at the end
        depth_coefficient=1.0,
        hidden_dim=32,
        in_channels=[32, 320],
        out_channels=[320, 320],
        kernel_sizes=[3, 5],
        strides=[2, 2],
        num_block_repeats=[1, 2],
        expand_ratios=[1, 2],
        drop_connect_rate=0.0,
        initializer_range=0.8,  # a norm of small weights would leave nothing of an image
    )
    config = FastVlmConfig(
        vision_config=vision,
        text_config=LlamaConfig(**text_config(tokenizer)),
        image_token_index=3,
        image_seq_length=(SIDE // PATCH) ** 2,
        tie_word_embeddings=False,
    )
    images = CLIPImageProcessorPil(size=side, crop_size=side, do_center_crop=False)
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": PATCH,
        "vision_feature_select_strategy": "full",
        "num_additional_image_tokens": 0,
    }
    return save(folder, FastVlmForConditionalGeneration, config, tokenizer, images, processor, tiny.LLAVA_TEMPLATE)


def save_llava_next(folder: Path) -> Path:
    """LLaVA-NeXT: a base view and up to four crops."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    tokenizer = tiny.byte_tokenizer()
    grid = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(image_size=SIDE, patch_size=PATCH, projection_dim=16, **VISION),
        text_config=LlamaConfig(**text_config(tokenizer)),
        image_token_index=3,
        image_grid_pinpoints=grid,
        tie_word_embeddings=False,
    )
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=grid
    )
    processor = {
        "processor_class": "LlavaNextProcessor",
        "patch_size": PATCH,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    return save(folder, LlavaNextForConditionalGeneration, config, tokenizer, images, processor, tiny.LLAVA_TEMPLATE)


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_qwen2_5_vl(folder: Path, width: int = tiny.HIDDEN) -> Path:
    """Qwen2.5-VL: no first token, patches of images of any size, windows in the vision tower, M-RoPE.

    Its heads have a quarter of the width each, and those of its vision tower too, but 16 at least.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    special.append("<|video_pad|>")
    tokenizer = byte_tokenizer(special, None, "<|im_end|>", "<|endoftext|>", adds_bos=False)
    vision = {
        "depth": 2,
        "hidden_size": max(32, width // 2),
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": width,
        "patch_size": PATCH,
        "spatial_merge_size": 2,
        "window_size": 32,
        "fullatt_block_indexes": [1],
    }
    section = [width // 16, width // 32, width // 32]
    rope = {"rope_type": "default", "mrope_section": section, "rope_theta": 10000.0}
    config = Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=text_config(tokenizer, hidden_size=width, rope_parameters=rope),
        image_token_id=5,
        video_token_id=6,
        vision_start_token_id=3,
        vision_end_token_id=4,
        tie_word_embeddings=False,
    )
    images = Qwen2VLImageProcessorPil(
        patch_size=PATCH, merge_size=2, size={"shortest_edge": 16 * 16, "longest_edge": 96 * 96}
    )
    chat = CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    processor = {"processor_class": "Qwen2_5_VLProcessor"}
    return save(folder, Qwen2_5_VLForConditionalGeneration, config, tokenizer, images, processor, chat)


def save_internvl(folder: Path) -> Path:
    """InternVL: up to four square crops and a small view of the whole."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration, Qwen2Config
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
    tokenizer = byte_tokenizer(
        special,
        None,
        "<|im_end|>",
        "<|endoftext|>",
        adds_bos=False,
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    config = InternVLConfig(
        vision_config={"image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH], **VISION},
        text_config=Qwen2Config(**text_config(tokenizer)),
        image_token_id=5,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    images = GotOcr2ImageProcessorPil(size={"height": SIDE, "width": SIDE}, crop_to_patches=True, max_patches=4)
    processor = {"processor_class": "InternVLProcessor", "image_seq_length": 4}
    chat = CHATML.replace("IMAGE", "<IMG_CONTEXT>\n")
    return save(folder, InternVLForConditionalGeneration, config, tokenizer, images, processor, chat, "Fast")


IDEFICS_CHAT = (
    "FIRST{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}:{% else %}: {% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
IDEFICS_SPECIAL = ["<pad>", "<|first|>", "<|last|>", "<fake_token_around_image>", "<image>", "<end_of_utterance>"]


def _save_idefics(folder: Path, config: Any, model: Any, images: Any, name: str, bos: bool) -> Path:
    tokenizer = byte_tokenizer(
        [*IDEFICS_SPECIAL, "<global-img>", *ROWS], "<|first|>", "<|last|>", "<pad>", adds_bos=bos
    )
    whole = config(
        vision_config={"image_size": SIDE, "patch_size": PATCH, **VISION},
        text_config={"model_type": "llama", **text_config(tokenizer)},
        image_token_id=4,
        scale_factor=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    pictures = images(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
    processor = {"processor_class": name, "image_seq_len": 4}
    return save(folder, model, whole, tokenizer, pictures, processor, IDEFICS_CHAT.replace("FIRST", "<|first|>"))


def save_idefics3(folder: Path) -> Path:
    """Idefics3: rows and columns of crops, then the whole; its tokenizer and its template both add a first token."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    return _save_idefics(
        folder, Idefics3Config, Idefics3ForConditionalGeneration, Idefics3ImageProcessorPil, "Idefics3Processor", True
    )


def save_smolvlm(folder: Path) -> Path:
    """SmolVLM: like Idefics3, with a video processor."""
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    return _save_idefics(
        folder, SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMImageProcessorPil, "SmolVLMProcessor", False
    )


GEMMA_CHAT = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<start_of_image>{% else %}"
    "{{ part['text'] | trim }}{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def save_gemma3(folder: Path) -> Path:
    """Gemma 3: one sliding and one full layer; the end of a turn is not the tokenizer's end token."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    special = ["<pad>", "<eos>", "<bos>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"]
    tokenizer = byte_tokenizer(
        [*special, "<start_of_turn>", "<end_of_turn>"],
        "<bos>",
        "<eos>",
        "<pad>",
        adds_bos=True,
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
        image_token="<image_soft_token>",
    )
    text = text_config(
        tokenizer,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=12,
        layer_types=["sliding_attention", "full_attention"],
    )
    config = Gemma3Config(
        vision_config={
            "model_type": "siglip_vision_model",
            "image_size": SIDE,
            "patch_size": PATCH,
            **VISION,
            "vision_use_head": False,
        },
        text_config=text,
        mm_tokens_per_image=4,
        boi_token_index=3,
        eoi_token_index=4,
        image_token_index=5,
        initializer_range=0.15,
        tie_word_embeddings=False,
    )
    images = Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE})
    processor = {"processor_class": "Gemma3Processor", "image_seq_length": 4}
    return save(folder, Gemma3ForConditionalGeneration, config, tokenizer, images, processor, GEMMA_CHAT)


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "llava": save_llava,
    "fast_vlm": save_fast_vlm,
    "llava_next": save_llava_next,
    "qwen2_5_vl": save_qwen2_5_vl,
    "internvl": save_internvl,
    "idefics3": save_idefics3,
    "smolvlm": save_smolvlm,
    "gemma3": save_gemma3,
}
