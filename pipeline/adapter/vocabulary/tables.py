"""The two tensors that know the vocabulary, embedding table and output layer, in a checkpoint's files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.adapter.vocabulary.tokens import Added
from pipeline.backbones.lmm_weights import empty_model
from pipeline.errors import UserError
from pipeline.files.atomic import replacing
from pipeline.hub.weights import StoredTensor, tensors_of

MULTIPLE = 64  # a table that grows gets a multiple of so many rows, as matrix kernels prefer; the rest is spare
ROWS_AT_ONCE = 1 << 14  # rows of a table that are converted at once
READ = ("F32", "F16", "BF16")
EMBEDDING_FILE, HEAD_FILE = "model-vocabulary-embedding.safetensors", "model-vocabulary-head.safetensors"


@dataclass(frozen=True)
class Tables:
    """Where a checkpoint has its embedding table [V, D] and its output layer [V, D].

    `head` is the output layer's name in the new checkpoint, and `head_values` the stored tensor with its values: the
    embedding table, where the two are tied.
    """

    kind: str  # model_type in config.json
    tensors: Mapping[str, StoredTensor]
    embedding: str
    head: str
    head_values: str

    @property
    def rows(self) -> int:
        return self.tensors[self.embedding].shape[0]

    @property
    def width(self) -> int:
        return self.tensors[self.embedding].shape[1]

    @property
    def replaced(self) -> set[str]:
        """The stored tensors that the new tables take the place of."""
        return {self.embedding, self.head} & self.tensors.keys()

    def size(self, tokens: Added) -> int:
        """Rows of the new tables: as many as before where the tokens fit into spare ones."""
        return self.rows if tokens.end <= self.rows else -(-tokens.end // MULTIPLE) * MULTIPLE

    def write_embedding(self, path: Path, vectors: Tensor, tokens: Added, dtype: torch.dtype) -> None:
        """Write the embedding table with `vectors` [count, D] in the rows of the new tokens."""
        table = self._grown(self.embedding, self.size(tokens), dtype)
        table[tokens.first : tokens.end] = vectors.to(dtype)
        _save(self.embedding, table, path)

    def write_head(self, path: Path, tokens: Added, dtype: torch.dtype) -> None:
        """Write an output layer that never gives one of the new tokens, or a new spare row, the highest score.

        Their rows are the mean of the rows of all tokens that there were, so their score is the mean of these tokens'
        scores, which is no higher than the highest. Of softmax they get at most one part in as many tokens, because the
        exponential of a mean is no larger than the mean of the exponentials.
        """
        table = self._grown(self.head_values, self.size(tokens), dtype)
        mean = table[: min(tokens.first, self.rows)].mean(0, dtype=torch.float32).to(dtype)
        table[tokens.first : tokens.end] = mean
        table[self.rows :] = mean
        _save(self.head, table, path)

    def _grown(self, name: str, size: int, dtype: torch.dtype) -> Tensor:
        """A stored table in this precision with `size` rows, the new ones zero; no other tensor is read."""
        table = torch.zeros(size, self.width, dtype=dtype)
        with safe_open(str(self.tensors[name].file), framework="pt") as file:
            stored = file.get_slice(name)
            for start in range(0, self.rows, ROWS_AT_ONCE):
                rows = stored[start : min(start + ROWS_AT_ONCE, self.rows)]
                table[start : start + len(rows)] = rows
        return table


def _save(name: str, table: Tensor, path: Path) -> None:
    with replacing(path) as temporary:
        save_file({name: table}, temporary, metadata={"format": "pt"})


def tables_of(folder: Path) -> Tables:
    """The tables of a checkpoint; UserError where they are not found, quantised, or have a bias.

    Which stored tensor is which is asked of transformers' model without weights: older checkpoints have other prefixes
    in their names, and tie the output layer to the embedding.
    """
    from transformers import AutoConfig

    tensors, model = tensors_of(folder), empty_model(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    model.tie_weights()
    if getattr(model.config, "quantization_config", None) is not None:
        raise UserError(f"The checkpoint in {folder} is quantised; expected one in bfloat16, float16 or float32.")
    inputs, output = model.get_input_embeddings(), model.get_output_embeddings()
    if getattr(output, "bias", None) is not None:
        raise UserError(f"The output layer of {folder} has a bias; expected one without, such as Llama's or Qwen's.")
    shape = tuple(inputs.weight.shape)
    embedding = _stored(tensors, _name(model, inputs), shape)
    if embedding is None:
        raise UserError(
            f"No weight file in {folder} has an embedding table of {shape[0]} x {shape[1]}; expected the checkpoint of "
            "a model whose config.json says its size."
        )
    stored_head = _stored(tensors, _name(model, output), shape)
    if stored_head is None and output.weight is not inputs.weight:
        raise UserError(f"No weight file in {folder} has the output layer of {shape[0]} x {shape[1]}; fetch it again.")
    if tensors[embedding].dtype not in READ:
        raise UserError(
            f"The embedding table in {folder} has the type {tensors[embedding].dtype}; expected BF16 or F32."
        )
    head = stored_head or _head_beside(embedding, _name(model, output))
    return Tables(model.config.model_type, tensors, embedding, head, stored_head or embedding)


def _name(model: Any, module: Any) -> str:
    """The name of a module's weight in the model."""
    return next(name for name, found in model.named_modules() if found is module) + ".weight"


def _stored(tensors: Mapping[str, StoredTensor], name: str, shape: tuple[int, ...]) -> str | None:
    """The stored tensor of this shape whose name ends as the model's does; None where there is none."""
    ending = ".".join(name.split(".")[-2:])
    fitting = [
        stored
        for stored, tensor in tensors.items()
        if tensor.shape == shape and (stored == ending or stored.endswith(f".{ending}"))
    ]
    return fitting[0] if len(fitting) == 1 else None


def _head_beside(embedding: str, name: str) -> str:
    """A name for the output layer in the manner of the checkpoint's other names, of which there are two."""
    prefix, found, _ = embedding.partition("language_model.model.")
    return f"{prefix}language_model.lm_head.weight" if found else name
