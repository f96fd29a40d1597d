"""The frozen multimodal model, reached only through `inputs_embeds` so that its vocabulary is never touched."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import ModelConfig
from pipeline.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Architectures whose parts are where `LMM` looks for them; another one needs its own subclass.
SUPPORTED = ("llava",)
SAMPLED_BYTES = 1 << 20  # of each weight file's start and end; reading 14 GB for a fingerprint would take minutes


class LMM(nn.Module):
    """A frozen image-text-to-text model in eval mode with its processor.

    Only submodules are called, never bare weights, so that ZeRO-3 can gather what is needed (engineering.md B2).
    """

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__()
        kind = model.config.model_type
        if kind not in SUPPORTED:
            raise UserError(
                f"The model is of type '{kind}'; supported so far: {', '.join(SUPPORTED)}. "
                "Set model.path to a LLaVA checkpoint in Hugging Face format."
            )
        self.model = model
        self.processor = processor
        self.width: int = model.config.text_config.hidden_size
        self.image_token: int = model.config.image_token_id
        self.dtype: torch.dtype = model.dtype
        self.trains_projector = False
        self.freeze()

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    def freeze(self) -> None:
        """No gradients and no dropout for any weight."""
        self.requires_grad_(False)
        self.eval()

    def projector(self) -> nn.Module:
        """The module that maps image features to the language model's width; UserError where there is none."""
        module = getattr(self.model.model, "multi_modal_projector", None)
        if not isinstance(module, nn.Module):
            raise UserError(
                f"A model of type '{self.model.config.model_type}' has no image projector that could be trained. "
                "Set train.projector to frozen, or model.path to a LLaVA checkpoint."
            )
        return module

    def train_projector(self) -> None:
        """Let gradients reach the projector, and it alone."""
        self.projector().requires_grad_(True)
        self.trains_projector = True

    def load_projector(self, values: dict[str, Tensor]) -> None:
        """Give the projector of a whole model (not under ZeRO-3) these values, by their names in it."""
        self.projector().load_state_dict(values)

    def train(self, mode: bool = True) -> LMM:
        """Stays in eval mode: a frozen model is the same function in training and at inference."""
        return super().train(False)

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Projected image features [B, n, D] of `pixel_values` [B, 3, H, W]; with gradients if the projector trains."""
        with torch.set_grad_enabled(self.trains_projector and torch.is_grad_enabled()):
            output = self.model.model.get_image_features(pixel_values=pixel_values.to(self.dtype), return_dict=True)
        return torch.stack(list(output.pooler_output))

    def embed(self, input_ids: Tensor, pixel_values: Tensor, has_image: Tensor) -> Tensor:
        """Input embeddings [B, N, D]: words, and image features at the places of the image token.

        The vision tower runs for every sample; where there is no image `pixel_values` is a dummy and its features are
        dropped.
        """
        words = self.model.get_input_embeddings()(input_ids)
        features = self.image_features(pixel_values)[has_image].to(words.dtype)
        places = input_ids == self.image_token
        if int(places.sum()) != features.shape[0] * features.shape[1]:
            raise UserError(
                f"The batch has {int(places.sum())} image tokens for {len(features)} x {features.shape[1]} features. "
                "The processor's patch_size, num_additional_image_tokens and vision_feature_select_strategy must fit "
                "the model's; mend processor_config.json beside the model."
            )
        return words.masked_scatter(places[..., None], features)

    def hidden(self, embeddings: Tensor, attention: Tensor) -> Tensor:
        """Last hidden states [B, N, D] of the decoder; the batch is padded on the right."""
        return self.model.model.language_model(
            inputs_embeds=embeddings, attention_mask=attention, use_cache=False
        ).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token [..., V] in float32."""
        return self.model.get_output_embeddings()(hidden).float()

    @torch.no_grad()
    def generate(self, embeddings: Tensor, attention: Tensor, max_new_tokens: int) -> list[list[int]]:
        """Greedy answers (token ids, special ones included) to a batch padded on the left.

        Never under ZeRO-3: ranks whose answers end at different lengths would wait for each other (engineering.md
        B2.4).
        """
        tokenizer = self.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        output = self.model.generate(
            inputs_embeds=embeddings,
            attention_mask=attention,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id,
            synced_gpus=False,
        )
        return output.tolist()

    def vocabulary_rows(self, rows: Tensor) -> Tensor:
        """The given rows [n, D] of the input embedding, in float32, also under ZeRO-3 (all ranks must call it)."""
        weight = self.model.get_input_embeddings().weight
        with _gathered(weight):
            return weight.detach()[rows.to(weight.device)].float().cpu()


@contextlib.contextmanager
def _gathered(parameter: nn.Parameter) -> Iterator[None]:
    """The whole parameter, whether or not ZeRO-3 has partitioned it."""
    if not hasattr(parameter, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        yield


def load_lmm(config: ModelConfig, zero3: dict[str, Any] | None = None) -> LMM:
    """Load model and processor; `zero3` is the DeepSpeed configuration when the weights are to be partitioned at load.

    Raises UserError when the checkpoint is missing or is not an image-text-to-text model.
    """
    from transformers import AutoModelForImageTextToText
    from transformers.integrations import deepspeed as integration
    from transformers.utils import logging as progress

    progress.disable_progress_bar()
    processor = load_processor(config)
    # transformers holds the configuration by a weak reference only: `live` must stay until the weights are loaded.
    live = integration.HfDeepSpeedConfig(zero3) if zero3 is not None else None
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            config.location,
            revision=config.revision,
            dtype=DTYPES[config.dtype],
            attn_implementation=config.attn_implementation,
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _not_loadable(config, error) from error
    finally:
        if live is not None:
            integration.unset_hf_deepspeed_config()
            del live
    if zero3 is not None:
        whole = [name for name, parameter in model.named_parameters() if not hasattr(parameter, "ds_id")]
        assert not whole, f"not partitioned at load: {whole[:3]} and {len(whole)} in all"
    return LMM(model, processor)


def load_processor(config: ModelConfig) -> Any:
    """The processor (tokenizer, image processor, chat template) of a checkpoint; images go through the PIL backend."""
    from transformers import AutoProcessor

    try:
        # One backend everywhere: torchvision resizes differently, so answers would depend on what is installed.
        processor = AutoProcessor.from_pretrained(
            config.location, revision=config.revision, trust_remote_code=False, backend="pil"
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _not_loadable(config, error) from error
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise UserError(
            f"model.path '{config.path}' has no image processor or no tokenizer. Expected an "
            "image-text-to-text checkpoint with processor_config.json or preprocessor_config.json and tokenizer files."
        )
    return processor


def _not_loadable(config: ModelConfig, error: BaseException) -> UserError:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return UserError(
        f"The model '{config.path}' cannot be loaded ({first}). Expected a folder or Hugging Face id of an "
        "image-text-to-text model with its processor; check model.path and model.revision."
    )


def base_fingerprint(config: ModelConfig) -> str:
    """SHA-256 (hex) that tells base models apart: the configuration and size and samples of each weight file."""
    from transformers.utils import cached_file

    try:
        folder = Path(cached_file(config.location, "config.json", revision=config.revision)).parent
    except OSError as error:
        raise _not_loadable(config, error) from error
    settings = json.loads((folder / "config.json").read_text("utf-8"))
    for name in ("transformers_version", "_name_or_path"):
        settings.pop(name, None)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(SAMPLED_BYTES))
            file.seek(max(0, size - SAMPLED_BYTES))
            digest.update(file.read(SAMPLED_BYTES))
    return digest.hexdigest()
