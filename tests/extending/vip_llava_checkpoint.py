"""A tiny random VipLLaVA, in the files that its real checkpoints have."""

from __future__ import annotations

from pathlib import Path

import torch

from tests import tiny


def save_vip_llava(folder: Path) -> Path:
    """Hidden 32, two layers, 16 image tokens, as `tests.tiny.save_llava`."""
    from transformers import CLIPVisionConfig, LlamaConfig, VipLlavaConfig, VipLlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=tiny.IMAGE_SIZE,
        patch_size=tiny.PATCH,
        projection_dim=16,
    )
    text = LlamaConfig(
        vocab_size=len(tiny.byte_tokenizer()),
        hidden_size=tiny.HIDDEN,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.15,
    )
    config = VipLlavaConfig(
        vision_config=vision, text_config=text, image_token_index=3, vision_feature_layers=[-1, -2], image_seq_length=16
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        VipLlavaForConditionalGeneration(config).float().save_pretrained(folder)
    tiny.save_processor(folder, tiny.IMAGE_SIZE, tiny.PATCH)
    return folder
