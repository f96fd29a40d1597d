"""The frozen multimodal model, called with `inputs_embeds` only, so that its vocabulary never changes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.backbones.attentions import require_kernel
from pipeline.backbones.image_layer import ImageLayer, projector_input
from pipeline.backbones.last_layer import last_layer_at, rows_at
from pipeline.backbones.lmm_families import family_of, require_two_passes
from pipeline.backbones.lmm_processor import check_image_size, load_processor, source_of
from pipeline.backbones.lmm_weights import DTYPES, load_shard, load_weights
from pipeline.backbones.precision import allow_tf32
from pipeline.backbones.sharded import Place, Shards
from pipeline.backbones.shortcuts import log_shortcuts
from pipeline.config.low_rank import IMAGE_LAYER, INPUT_LAYER, OUTPUT_LAYER
from pipeline.config.models import ModelConfig
from pipeline.data.conversation import KEPT, Conversation
from pipeline.errors import UserError
from pipeline.hub.snapshots import checkpoint

__all__ = ["DTYPES", "LMM", "load_lmm", "load_processor"]


class LMM(nn.Module):
    """A frozen image-text-to-text model in eval mode with its processor.

    Only submodules are called, never bare weights, because ZeRO-3 gathers weights by submodule (docs/design.md 7.2).
    `family` holds what differs between architectures.
    """

    def __init__(self, model: Any, processor: Any, config: ModelConfig | None = None) -> None:
        super().__init__()
        self.family = family_of(model.config.model_type)(model)
        self.model = model
        self.processor = processor
        self.config = config
        self.width: int = model.config.text_config.hidden_size
        self.image_token: int = model.config.image_token_id
        self.dtype: torch.dtype = model.dtype
        self.image_layer = ImageLayer(projector_input(model, self.family), self.width)
        self.trains_projector = False
        self.cuts = False  # whether too long samples are truncated, see `Conversation`
        self.shards: Shards | None = None  # where the layers are on several ranks
        if config is not None and config.image_tokens is not None:
            self.family.adopt(processor)
        self.freeze()

    @cached_property
    def conversation(self) -> Conversation:
        """Turns samples into tokens for this model, by the settings it was loaded with."""
        assert self.config is not None
        config = self.config
        return Conversation(self.processor, config.max_length, config.template, config.image_padding, self.cuts)

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    def freeze(self) -> None:
        """No gradients and no dropout for any weight."""
        self.requires_grad_(False)
        self.eval()

    def projector(self) -> nn.Module:
        """The module that maps image features to the language model's width; UserError where there is none."""
        try:
            return self.model.model.get_submodule(self.family.projector)
        except AttributeError:
            raise UserError(
                f"This {self.model.config.model_type} model has no image projector that could be trained. "
                "Set train.projector to frozen."
            ) from None

    def projector_values(self) -> dict[str, Tensor]:
        """The projector's weights in float32 on the CPU; under ZeRO-3 all ranks call it."""
        values = {}
        for name, parameter in self.projector().named_parameters():
            with _gathered(parameter):
                values[name] = parameter.detach().float().cpu().clone()
        return values

    def train_projector(self) -> None:
        """Make the projector trainable, and nothing else."""
        self.projector().requires_grad_(True)
        self.trains_projector = True

    def load_projector(self, values: dict[str, Tensor]) -> None:
        """Load these values by name into the projector of a model that is not partitioned."""
        self.projector().load_state_dict(values)

    def train(self, mode: bool = True) -> LMM:
        """Stays in eval mode: a frozen model is the same function in training and at inference."""
        return super().train(False)

    def image_features(self, images: dict[str, Tensor]) -> Tensor:
        """Projected features [n, D] of a batch's images, in order; with gradients if the projector is trained."""
        with torch.set_grad_enabled(self.trains_projector and torch.is_grad_enabled()):
            if KEPT in images:
                return self.family.projected(images[KEPT].to(self.dtype))
            return self.family.image_features(self._in_own_precision(images))

    @torch.no_grad()
    def tower_features(self, images: dict[str, Tensor]) -> Tensor:
        """Input of the projector [n, tokens, width] for a batch's images, to be stored and passed as `KEPT`."""
        return self.family.tower_features(self._in_own_precision(images))

    def _in_own_precision(self, images: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**images, "pixel_values": images["pixel_values"].to(self.dtype)}

    def embed(self, input_ids: Tensor, images: dict[str, Tensor], has_image: Tensor) -> Tensor:
        """Input embeddings [B, N, D]: words, and image features at the positions of the image token.

        The vision tower runs for every batch, so that ranks call the same modules (docs/design.md 3.2); where no sample
        has an image, `images` is a blank one and its features are dropped.
        """
        return self.place_features(self.words(input_ids), input_ids, images, has_image)

    def words(self, input_ids: Tensor) -> Tensor:
        """Input embeddings [..., D] of tokens; image tokens get the embedding of their placeholder."""
        words: Tensor = self.input_embeddings(input_ids)
        return words

    def place_features(self, words: Tensor, input_ids: Tensor, images: dict[str, Tensor], has_image: Tensor) -> Tensor:
        """`embed` with the word embeddings [B, N, D] computed already."""
        if self.image_layer.updates and KEPT not in images:
            images = {KEPT: self.tower_features(images)}
        features = self.image_features(images).to(words.dtype)
        if not has_image.any():
            features = features[:0]
        places = self.image_places(input_ids)
        if int(places.sum()) != len(features):
            raise UserError(
                f"The batch has {int(places.sum())} image tokens for {len(features)} features of its images. The "
                "processor's settings (patch size, tokens per image, vision_feature_select_strategy) must fit the "
                "model's; correct processor_config.json in the model's folder."
            )
        rows = words.masked_scatter(places[..., None], features)
        if not self.image_layer.updates:
            return rows
        # Without an image too: under ZeRO-3 all ranks gather the same updates.
        read = images[KEPT].to(words.dtype).flatten(0, -2)
        inputs = read.new_zeros(*places.shape, read.shape[-1]).masked_scatter(places[..., None], read)
        return torch.where(places[..., None], rows + self.image_layer.added(inputs), rows)

    def image_places(self, input_ids: Tensor) -> Tensor:
        """Which tokens [B, N] are placeholders of image features."""
        return input_ids == self.image_token

    def image_spans(self, places: Tensor) -> Tensor:
        """`image_places` [B, N] and the marker tokens directly before and after an image."""
        return self.family.image_spans(places)

    def require_two_passes(self, setting: str = "") -> None:
        """Raise UserError where `setting` needs a prefix cache, which this model does not support."""
        require_two_passes(self.family, setting)

    def hidden(
        self,
        embeddings: Tensor,
        attention: Tensor,
        places: Tensor | None = None,
        images: dict[str, Tensor] | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        """Last hidden states of the decoder, [B, N, D], or [B, A, D] at the positions `at`.

        Args:
            embeddings: [B, N, D], padded on the right.
            attention: [B, N].
            places: [B, N], which tokens are an image's; for families with `needs_image_mask`.
            images: the batch's image tensors; for the same families.
            at: [B, A]; None: all positions.
        """
        inputs = self.decoder_inputs(embeddings, attention, places, images)
        return self.decode(at, inputs_embeds=embeddings, use_cache=False, **inputs)

    def decode(self, at: Tensor | None = None, **inputs: Any) -> Tensor:
        """Last hidden states of the decoder for these arguments of its forward; see `hidden`."""
        with last_layer_at(self.decoder, at, self.family.lean_attentions) as lean:
            hidden: Tensor = self.decoder(**inputs).last_hidden_state
        return hidden if lean or at is None else rows_at(hidden, at)

    @property
    def decoder(self) -> nn.Module:
        """The language model without its head."""
        return self.model.model.get_submodule(self.family.decoder)

    @property
    def linears(self) -> dict[str, nn.Linear]:
        """The linear layers behind the input embeddings: the decoder's by their names in it, and the output layer."""
        return linears_of(self.model, self.decoder)

    @property
    def input_embeddings(self) -> nn.Embedding:
        """The layer that maps token ids to the decoder's inputs."""
        embeddings: nn.Embedding = self.model.get_input_embeddings()
        return embeddings

    def layer(self, name: str) -> nn.Module:
        """The layer of that name among `linears`, the input embeddings, or the image projector's."""
        if name == INPUT_LAYER:
            return self.input_embeddings
        if name == IMAGE_LAYER:
            return self.image_layer
        output: nn.Module = self.model.get_output_embeddings()
        return output if name == OUTPUT_LAYER else self.decoder.get_submodule(name)

    def decoder_inputs(
        self, embeddings: Tensor, attention: Tensor, image_mask: Tensor | None, images: dict[str, Tensor] | None
    ) -> dict[str, Any]:
        """`LMMFamily.decoder_inputs`; ValueError where the family needs the image mask and it is missing."""
        if self.family.needs_image_mask and (image_mask is None or images is None):
            raise ValueError(f"the decoder of {self.family.kind} has to know which tokens are an image's")
        return self.family.decoder_inputs(embeddings, attention, image_mask, images)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token [..., V] in float32."""
        return self.model.get_output_embeddings()(hidden).float()

    def agreed(self, tokens: Tensor) -> Tensor:
        """Chosen tokens [n], the same on all ranks where the layers are on several."""
        return tokens if self.shards is None else self.shards.agreed(tokens)

    @property
    def stops(self) -> list[int]:
        """Tokens that end an answer: the end token of training, and those of generation_config.json."""
        known = self.model.generation_config.eos_token_id
        stops = {self.tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])}
        if self.config is not None:
            stops.add(self.conversation.end_token)
        return sorted(stops - {None})

    def use_repetition_penalty(self, penalty: float | str) -> None:
        """Set the repetition penalty of decoding; "checkpoint": keep that of generation_config.json."""
        if penalty != "checkpoint":
            self.model.generation_config.repetition_penalty = penalty

    def vocabulary_rows(self, rows: Tensor) -> Tensor:
        """Input embeddings [n, D] of these token ids in float32; under ZeRO-3 all ranks call it."""
        weight: nn.Parameter = self.model.get_input_embeddings().weight
        with _gathered(weight):
            return weight.detach()[rows.to(weight.device)].float().cpu() * self.family.embedding_scale


def linears_of(model: Any, decoder: nn.Module) -> dict[str, nn.Linear]:
    """`LMM.linears` of a model, which may be on the meta device, and its decoder."""
    found = {name: module for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
    output = model.get_output_embeddings()
    return {**found, OUTPUT_LAYER: output} if isinstance(output, nn.Linear) else found


@contextlib.contextmanager
def _gathered(parameter: nn.Parameter) -> Iterator[None]:
    """Gather a parameter that ZeRO-3 has partitioned; a collective, so all ranks must call it."""
    if not hasattr(parameter, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        yield


def load_lmm(
    config: ModelConfig,
    zero3: dict[str, Any] | None = None,
    device: torch.device | str | None = None,
    place: Place | None = None,
) -> LMM:
    """Load model and processor.

    Args:
        config: the recipe's section.
        zero3: the DeepSpeed configuration where the weights are to be partitioned at load; then all ranks call this.
        device: each weight is moved there as it is read, so host memory never holds the whole model; None: the CPU.
        place: this rank where the layers are divided over several (`pipeline.backbones.sharded`); it reads its own.

    Raises UserError when the checkpoint is missing, is not an image-text-to-text model, or lacks weights.
    """
    require_kernel(config)
    if config.tf32:
        allow_tf32(device)
    folder = checkpoint(source_of(config)).folder  # fetched first, so that missing files are reported first
    processor = load_processor(config)
    if place is None:
        model, shards = load_weights(config, folder, zero3, device), None
    else:
        model, shards = load_shard(config, folder, torch.device(device or "cpu"), place)
    check_image_size(config, model.config, processor)
    lmm = LMM(model, processor, config)
    lmm.shards = shards
    log_shortcuts(lmm.family, lmm.decoder)
    return lmm
