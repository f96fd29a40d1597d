"""The small files of an exported checkpoint: configuration, processor, tokenizer, chat template and generation."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.adapter.vocabulary.template import Places, chat_template, original_template
from pipeline.adapter.vocabulary.tokens import Added, add_to_files
from pipeline.backbones.lmm_processor import load_processor
from pipeline.config.models import ModelConfig
from pipeline.data.conversation import Conversation
from pipeline.errors import UserError
from pipeline.files.atomic import write_json
from pipeline.hub.pickled import SETTINGS

LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
TEMPLATE = "chat_template.jinja"
UNLIMITED = 1 << 40  # tokens
TEXT = "text_config"  # the language model's section of config.json, which older checkpoints lack


@dataclass(frozen=True)
class Tables:
    """Sizes of the new tables and their precision."""

    size: int
    dtype: str


def conversation_of(processor: Any, config: ModelConfig) -> Conversation:
    """A run's way to write conversations, without its limit on their length."""
    return Conversation(processor, UNLIMITED, config.template, config.image_padding)


def write_settings(
    base: Path, folder: Path, conversation: Conversation, model: ModelConfig, tokens: Added, places: Places
) -> None:
    """Write everything but weights, configuration and generation settings into a new checkpoint's folder.

    Raises UserError where images are prepared in a way that the model's image processor has no setting for.

    Args:
        base: folder of the frozen model's checkpoint.
        folder: the new one's.
        conversation: how the run writes conversations.
        model: the run's settings of the frozen model.
        tokens: what the vocabulary gets.
        places: where sets stand in a conversation.
    """
    for pattern in (*SETTINGS, *LICENCES):
        for path in base.glob(pattern):
            if path.is_file() and not path.name.endswith(".index.json") and not path.name.startswith("chat_template"):
                shutil.copyfile(path, folder / path.name)
    add_to_files(conversation.tokenizer, tokens, folder)
    template = chat_template(original_template(conversation), places, tokens)
    (folder / TEMPLATE).write_text(template, encoding="utf-8")
    _write_processor(folder, conversation.processor, model)


def _write_processor(folder: Path, processor: Any, model: ModelConfig) -> None:
    """Write what a run sets in the processor: the limit of an image's tokens, padding, fields that old files lack."""
    changes: dict[str, Any] = {}
    if model.image_tokens is not None:
        plain = load_processor(model.model_copy(update={"image_tokens": None}))
        before, after = (one.image_processor.to_dict() for one in (plain, processor))
        changes = {name: value for name, value in after.items() if before.get(name) != value}
    if model.image_padding == "square":
        kind = type(processor.image_processor).__name__
        if not kind.startswith(("CLIPImageProcessor", "LlavaImageProcessor")):
            raise UserError(
                f"model.image_padding is square, which {kind} has no setting for; expected none, or `export` as an "
                "adapter."
            )
        changes |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    path = folder / "processor_config.json"
    content = _read(path)
    content.pop("chat_template", None)
    fields = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")
    missing = {name: getattr(processor, name) for name in fields if hasattr(processor, name) and name not in content}
    if missing:
        content |= {"processor_class": type(processor).__name__, **missing}
    within = content.get("image_processor")
    if isinstance(within, dict):
        within |= changes
    elif changes:
        other = folder / "preprocessor_config.json"
        write_json(other, _read(other) | changes)
    if content:
        write_json(path, content)


def write_config(base: Path, folder: Path, tables: Tables, processor: Any) -> None:
    """Write config.json: the new size of the vocabulary, an output layer of its own, and the run's precision."""
    content = _read(base / "config.json")
    text = content.get(TEXT)
    places = [content, text] if isinstance(text, dict) else [content]
    for place in places:
        if "vocab_size" in place or place is places[-1]:
            place["vocab_size"] = tables.size
        place["tie_word_embeddings"] = False
    for section in [content, *(value for value in content.values() if isinstance(value, dict))]:
        for name in ("dtype", "torch_dtype"):
            if name in section:
                section[name] = tables.dtype
    content["torch_dtype" if "torch_dtype" in content else "dtype"] = tables.dtype
    grids = getattr(processor.image_processor, "image_grid_pinpoints", None)
    if grids is not None and "image_grid_pinpoints" in content:
        content["image_grid_pinpoints"] = [list(grid) for grid in grids]
    write_json(folder / "config.json", content)


def write_generation(base: Path, folder: Path, conversation: Conversation, never: list[int], penalty: Any) -> None:
    """Write generation_config.json: the tokens that end answers in the run, and those that are never generated.

    Args:
        base: folder of the frozen model's checkpoint.
        folder: the new one's.
        conversation: how the run writes conversations.
        never: the ids that `generate` of transformers suppresses.
        penalty: the run's `evaluate.repetition_penalty`.
    """
    path = base / "generation_config.json"
    content = _read(path)
    if not path.is_file():  # transformers then takes them from config.json
        settings = _read(base / "config.json")
        fields = {**settings, **(settings.get(TEXT) or {})}
        content = {name: fields[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in fields}
    known = content.get("eos_token_id")
    stops = {
        conversation.tokenizer.eos_token_id,
        conversation.end_token,
        *(known if isinstance(known, list) else [known]),
    }
    content["eos_token_id"] = sorted(stops - {None})
    content["suppress_tokens"] = sorted({*(content.get("suppress_tokens") or []), *never})
    if penalty != "checkpoint":
        content["repetition_penalty"] = penalty
    write_json(folder / "generation_config.json", content)


def _read(path: Path) -> dict[str, Any]:
    """A JSON file's object; empty where there is no file."""
    return dict(json.loads(path.read_text("utf-8"))) if path.is_file() else {}
