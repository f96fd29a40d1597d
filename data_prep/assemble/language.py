"""Language models with their tokenizers, as transformers has them: from a GGUF file, or a folder that it saved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import UserError


@dataclass(frozen=True)
class Language:
    """A causal language model and its tokenizer, which has a chat template."""

    model: Any
    tokenizer: Any

    @property
    def width(self) -> int:
        """Width of its word embeddings."""
        return int(self.model.config.hidden_size)


def load_language(folder: Path, file: str | None = None) -> Language:
    """Load a language model in float32 from a folder, or from a GGUF file in it, whose quantised weights are expanded.

    Raises UserError where the package `gguf` is missing, the file's quantisation or architecture cannot be read,
    weights are missing, or the tokenizer lacks a chat template.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = folder / file if file else folder
    how: dict[str, Any] = {"gguf_file": file} if file else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **how)
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False, output_loading_info=True, **how
        )
    except ImportError as error:
        raise UserError(
            f"The language model {where} cannot be read ({error}); run `make small`, or install the extra small."
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError, AttributeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        kinds = "; of GGUF, transformers reads Q4_0 to Q8_0, K and IQ4 kinds, F16, BF16 and F32" if file else ""
        raise UserError(f"The language model {where} cannot be read ({first}){kinds}. Name another file.") from error
    if report["missing_keys"]:
        raise UserError(f"The language model {where} lacks tensors, for example {min(report['missing_keys'])}.")
    if not tokenizer.chat_template:
        raise UserError(
            f"The tokenizer of {where} has no chat template, which says how questions are put to it. Use an "
            "instruction-tuned model."
        )
    return Language((plain(model) if file else model).eval().requires_grad_(False), tokenizer)


def plain(model: Any) -> Any:
    """A model of the same class and weights that does not know it was quantised, and so can be saved."""
    settings = model.config.to_dict()
    settings.pop("quantization_config", None)
    settings.pop("_name_or_path", None)
    fresh = type(model)(type(model.config)(**settings))
    fresh.load_state_dict(model.state_dict())
    fresh.generation_config = model.generation_config
    return fresh
