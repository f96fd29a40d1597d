"""Joins the parts to one checkpoint that transformers loads: a FastVLM for convolutional towers, else a LLaVA."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data_prep.assemble.card import FACTS, write_card
from data_prep.assemble.language import Language, load_language
from data_prep.assemble.parts import Part, find_part
from data_prep.assemble.recipe import AssembleRecipe, VisionConfig
from data_prep.assemble.template import with_images
from data_prep.assemble.vision import Tower, load_tower
from pipeline.errors import UserError
from pipeline.files.atomic import empty_folder, remove_folder, sync_folder, temporary_of

PROJECTOR = ("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def image_processor(image_size: int, mean: float, deviation: float) -> Any:
    """Resizes pictures to squares of `image_size` pixels, whole and without a border, and normalises their values."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    side = {"height": image_size, "width": image_size}
    return CLIPImageProcessorPil(
        size=side, crop_size=side, do_center_crop=False, image_mean=[mean] * 3, image_std=[deviation] * 3
    )


def assemble(recipe: AssembleRecipe, base: Path, out: Path) -> Path:
    """Write the checkpoint of a recipe to `out`, which is replaced whole; returns it.

    Args:
        recipe: the model.
        base: the folder at which relative folders of the recipe start.
        out: folder of the checkpoint.

    Raises UserError where a part is missing, is another than the recipe's, or does not fit the others, and where `out`
    holds something else than an assembled model.
    """
    if out.exists() and not (out / FACTS).is_file():
        raise UserError(f"'{out}' exists and holds no assembled model; remove it or give another folder by --out.")
    parts = {name: find_part(name, getattr(recipe, name), base) for name in ("vision", "language", "projector")}
    tower = load_tower(recipe.vision.layout, parts["vision"].path, recipe.vision.image_size)
    language = load_language(parts["language"].folder, parts["language"].file)
    projector = read_projector(parts["projector"], tower.width, language.width)
    model = joined(tower, language, projector, recipe.image_token, recipe.vision.image_size)
    temporary = temporary_of(out)
    try:
        empty_folder(temporary)
        model.to(DTYPES[recipe.dtype]).save_pretrained(temporary)
        processor_of(recipe, tower, language).save_pretrained(temporary)
        write_card(temporary, recipe, parts)
        for path in temporary.iterdir():
            path.chmod(0o644)  # safetensors makes its files with mode 0600
        sync_folder(temporary)
        if out.exists():
            remove_folder(out)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def read_projector(part: Part, vision: int, language: int) -> dict[str, Tensor]:
    """The projector's tensors in float32 by name; UserError where they do not fit these widths."""
    if part.file is None:
        raise UserError(f"projector.file is missing; expected the name of a .safetensors in {part.folder}.")
    try:
        found = load_file(part.path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"The projector {part.path} is no readable .safetensors ({error}).") from error
    wanted = dict(zip(PROJECTOR, ((language, vision), (language,), (language, language), (language,)), strict=True))
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    if shapes != wanted:
        wrong = next(
            (name for name in wanted if shapes.get(name) != wanted[name]),
            min(shapes.keys() - wanted.keys(), default=""),
        )
        raise UserError(
            f"The projector {part.path} does not fit: '{wrong}' is {shapes.get(wrong, 'missing')}, and a vision tower "
            f"of width {vision} with a language model of width {language} takes {wanted.get(wrong, 'no such tensor')}. "
            "Train one for these parts."
        )
    return {name: tensor.float() for name, tensor in found.items()}


def joined(tower: Tower, language: Language, projector: dict[str, Tensor], image_token: str, image_size: int) -> Any:
    """The multimodal model; adds the image token to the tokenizer and a row for it to the vocabulary, their mean."""
    from transformers import FastVlmConfig, FastVlmForConditionalGeneration, LlavaConfig, LlavaForConditionalGeneration

    tokenizer, text = language.tokenizer, language.model
    tokenizer.add_special_tokens({"additional_special_tokens": [image_token]}, replace_extra_special_tokens=False)
    if len(tokenizer) > text.config.vocab_size:
        text.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            for table in {
                id(m.weight): m for m in (text.get_input_embeddings(), text.get_output_embeddings())
            }.values():
                table.weight[-1] = table.weight[:-1].mean(0)
    image_number = tokenizer.convert_tokens_to_ids(image_token)
    common = {
        "vision_config": tower.model.config,
        "text_config": text.config,
        "image_token_index": image_number,
        "image_seq_length": (image_size // tower.patch) ** 2,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": bool(text.config.tie_word_embeddings),
    }
    if tower.convolutional:
        config: Any = FastVlmConfig(**common)
        model: Any = FastVlmForConditionalGeneration(config)
    else:
        config = LlavaConfig(vision_feature_layer=-2, vision_feature_select_strategy="default", **common)
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.model.state_dict())
    model.model.multi_modal_projector.load_state_dict(projector)
    model.model.language_model.load_state_dict(text.get_decoder().state_dict())
    model.lm_head.load_state_dict(text.get_output_embeddings().state_dict())
    if config.tie_word_embeddings:
        model.tie_weights()
    model.generation_config = text.generation_config
    return model.eval().requires_grad_(False)


def processor_of(recipe: AssembleRecipe, tower: Tower, language: Language) -> Any:
    """Tokenizer, image processor and chat template."""
    from transformers import LlavaProcessor

    vision: VisionConfig = recipe.vision
    template = with_images(language.tokenizer.chat_template, recipe.image_token, recipe.language.system)
    language.tokenizer.chat_template = template
    return LlavaProcessor(
        image_processor=image_processor(vision.image_size, vision.mean, vision.deviation),
        tokenizer=language.tokenizer,
        patch_size=tower.patch,
        vision_feature_select_strategy="full" if tower.convolutional else "default",
        num_additional_image_tokens=0 if tower.convolutional else 1,
        image_token=recipe.image_token,
        chat_template=template,
    )
