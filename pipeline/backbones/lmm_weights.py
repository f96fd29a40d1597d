"""Loads a checkpoint's weights and refuses missing or mismatched ones, which transformers would initialise randomly."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.backbones.lmm_families import family_of
from pipeline.backbones.lmm_processor import LOAD_ERRORS, not_loadable, source_of
from pipeline.backbones.meta_weights import PlainMeta
from pipeline.backbones.quantised import require_quantising
from pipeline.backbones.quick_import import deferring
from pipeline.backbones.sharded import Place, Shards, ranks_of
from pipeline.config.models import ModelConfig
from pipeline.errors import UserError
from pipeline.hub.snapshots import checkpoint
from pipeline.hub.weights import tensors_of
from pipeline.ranks.world import together

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_weights(
    config: ModelConfig, folder: Path, zero3: dict[str, Any] | None, device: torch.device | str | None
) -> Any:
    """The transformers model with the weights in `folder`; other arguments and errors as for `load_lmm`."""
    # Deferred: importing the auto classes takes a second, and most commands load no model.
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.integrations import deepspeed as integration
    from transformers.utils import logging as progress

    progress.disable_progress_bar()
    # transformers does not report missing weights under ZeRO-3, nor the shapes of weights that it quantises.
    if zero3 is not None:
        together(lambda: require_fitting_weights(config))
    quantization = None
    if config.quantization != "none":
        assert zero3 is None, "`require_whole_weights` refuses ZeRO-3"
        require_fitting_weights(config, folder)
        quantization = _quantization(config, folder, device)
    # transformers holds the configuration by a weak reference only: `live` must stay until the weights are loaded.
    live = integration.HfDeepSpeedConfig(zero3) if zero3 is not None else None
    try:
        kind = AutoConfig.from_pretrained(folder, trust_remote_code=False).model_type
        with deferring(), PlainMeta():
            model, report = AutoModelForImageTextToText.from_pretrained(
                folder,
                dtype=DTYPES[config.dtype],
                attn_implementation=family_of(kind).attention(config.attn_implementation),
                device_map=_device_map(device),
                trust_remote_code=False,
                use_safetensors=True,
                quantization_config=quantization,
                ignore_mismatched_sizes=True,  # refused below, by name
                output_loading_info=True,
            )
    except LOAD_ERRORS as error:
        raise not_loadable(config, error) from error
    finally:
        if live is not None:
            integration.unset_hf_deepspeed_config()
            del live
    if zero3 is None:
        refuse_unfitting(config, report)
    else:
        whole = [name for name, parameter in model.named_parameters() if not hasattr(parameter, "ds_id")]
        assert not whole, f"not partitioned at load: {whole[:3]} and {len(whole)} in all"
    return model


def _device_map(device: torch.device | str | None) -> dict[str, torch.device] | None:
    # None for a CPU, where weights are read without one: with a map, accelerate is imported to attach no hooks.
    place = torch.device(device or "cpu")
    return None if place.type == "cpu" else {"": place}


def load_shard(config: ModelConfig, folder: Path, device: torch.device, place: Place) -> tuple[Any, Shards]:
    """The model with the weights in `folder` that are this rank's, and their division; otherwise as `load_weights`.

    Only this rank's weights are read.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.utils import logging as progress

    assert config.quantization == "none", "`ranks_per_replica` refuses quantised weights"
    progress.disable_progress_bar()
    try:
        settings = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        empty = empty_model(settings)
        ranks = ranks_of(empty, place.size)
        places = {name: device if rank == place.rank else torch.device("meta") for name, rank in ranks.items()}
        for name in ranks:  # the longest name counts
            places |= {f"{name}.{buffer}": device for buffer, _ in empty.get_submodule(name).named_buffers()}
        with _undispatched():
            model, report = AutoModelForImageTextToText.from_pretrained(
                folder,
                dtype=DTYPES[config.dtype],
                attn_implementation=family_of(settings.model_type).attention(config.attn_implementation),
                device_map={"": device, **places},
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # refused below, by name
                output_loading_info=True,
            )
    except LOAD_ERRORS as error:
        raise not_loadable(config, error) from error
    refuse_unfitting(config, report)
    return model, Shards(model, ranks, place, device)


@contextlib.contextmanager
def _undispatched() -> Iterator[None]:
    """While the block runs, transformers attaches no hooks to a model whose weights are on several devices.

    The hooks move inputs to the device of a module's weights, which for another rank's weights is the meta device.
    """
    from transformers import modeling_utils

    plain = modeling_utils.accelerate_dispatch
    modeling_utils.accelerate_dispatch = lambda *_, **__: None
    try:
        yield
    finally:
        modeling_utils.accelerate_dispatch = plain


def _quantization(config: ModelConfig, folder: Path, device: torch.device | str | None) -> Any:
    """What quantises the decoder while it is loaded; UserError where that is not possible here."""
    from transformers import AutoConfig

    require_quantising(config.quantization, torch.device(device or "cpu"))
    refuse_quantised_twice(config, AutoConfig.from_pretrained(folder, trust_remote_code=False))
    from pipeline.backbones.quantised_loading import DecoderQuantization  # imports transformers' quantisers

    return DecoderQuantization(config.quantization)


def refuse_quantised_twice(config: ModelConfig, settings: Any) -> None:
    """Raise UserError where weights that are stored in a quantised form (by its config.json) are to be quantised."""
    if config.quantization != "none" and getattr(settings, "quantization_config", None) is not None:
        raise UserError(
            f"model.quantization is {config.quantization}, and the weights of '{config.path}' are stored quantised "
            "already (quantization_config in its config.json). Set model.quantization to none, or model.path to the "
            "checkpoint they were made of."
        )


def require_fitting_weights(config: ModelConfig, folder: Path | None = None) -> None:
    """Raise UserError unless the checkpoint has every weight of the model in its shape; reads headers only.

    transformers renames tensors of older checkpoints and ties output layers to embeddings, so names cannot be compared
    directly: tensors on the meta device are loaded by transformers into a model on the meta device.
    """
    from transformers import AutoConfig
    from transformers.utils import logging as progress

    progress.disable_progress_bar()
    folder = folder or checkpoint(source_of(config)).folder
    stored = {name: torch.empty(tensor.shape, device="meta") for name, tensor in tensors_of(folder).items()}
    try:
        settings = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if getattr(settings, "quantization_config", None) is not None:
            return  # quantised weights have names and shapes that only the quantiser knows
        model = empty_model(settings)
        _, report = type(model).from_pretrained(
            None,
            config=settings,
            state_dict=stored,
            device_map={"": "meta"},
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except LOAD_ERRORS as error:
        raise not_loadable(config, error) from error
    refuse_unfitting(config, report)


def empty_model(settings: Any) -> Any:
    """transformers' model of a configuration on the meta device, without weights."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(settings, trust_remote_code=False)


def refuse_unfitting(config: ModelConfig, report: Mapping[str, Iterable[Any]]) -> None:
    """Raise UserError when transformers' loading report names missing or mismatched weights."""
    missing, mismatched = sorted(report["missing_keys"]), sorted(report["mismatched_keys"])
    if missing:
        raise UserError(
            f"The checkpoint of '{config.path}' lacks {len(missing)} of the model's weights, for example {missing[0]}; "
            "they would be initialised randomly. Expected a complete checkpoint of this architecture, not an adapter "
            "or a part of a model."
        )
    if mismatched:
        name, found, expected = mismatched[0]
        raise UserError(
            f"The checkpoint of '{config.path}' has {len(mismatched)} weights of another shape than its config.json "
            f"says, for example {name}: {list(found)}, expected {list(expected)}. Use weights and config.json of the "
            "same checkpoint."
        )
