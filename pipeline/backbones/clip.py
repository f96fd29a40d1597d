"""The frozen CLIP that computes the routing keys of an image and a question (docs/design.md 4.3)."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from PIL import Image
from safetensors import SafetensorError

from pipeline.backbones.lmm_families import known_families
from pipeline.backbones.meta_weights import PlainMeta
from pipeline.backbones.precision import has_tf32
from pipeline.backbones.quick_import import deferring, import_model_classes
from pipeline.data.pictures import central
from pipeline.errors import UserError
from pipeline.files.atomic import sha256
from pipeline.hub.snapshots import Snapshot, Source, checkpoint
from pipeline.ranks.devices import choose_device

Kind = Literal["clip", "siglip", "own"]
TextFeature = Literal["projected", "pooled"]
Truncation = Literal["head", "tail"]

# Increase it when the inputs of CLIP change: keys of another version count as those of another CLIP.
ENCODING_VERSION = 1

_PREPROCESSING_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
)


class KeyEncoder:
    """Image and text keys of one frozen CLIP; keys are not normalised.

    Image keys are CLIP's projected image embeddings. Text keys are the projected text embeddings (`projected`, the
    joint space) or the text tower's pooled output before the projection (`pooled`, as in the official code). For a text
    longer than CLIP's context `text_truncation` keeps the head, as CLIP does, or the tail, which holds the instruction
    of benchmark questions (docs/design.md 4.10, F5), and always the start and end tokens. Raises UserError when the
    checkpoint is not a complete CLIP, or when `pooled` vectors have another width than image keys.
    `pipeline.backbones.key_encoders` has the encoders of the other kinds.
    """

    kind: ClassVar[Kind] = "clip"
    width: int  # of the keys
    max_text: int  # tokens of a text that are read
    model: Any
    processor: Any
    tokenizer: Any

    def __init__(
        self,
        path: str | os.PathLike[str],
        revision: str | None = None,
        text_feature: TextFeature = "projected",
        text_truncation: Truncation = "head",
        device: torch.device | str | None = None,
        tf32: bool = False,
    ) -> None:
        """`tf32` allows TensorFloat-32 on GPUs of compute capability 8 and up, which is several times faster.

        Its relative error of a key is 4e-4 (emulated with the embedded CLIP); storing keys as float16 adds 2e-4.
        """
        self._source = (os.fspath(path), revision, text_feature, text_truncation)
        self.text_feature = text_feature
        self.head = text_truncation == "head"
        self.device = torch.device(choose_device(device))
        self.precision = "tf32" if tf32 and has_tf32(self.device) else "float32"
        self._load(_checkpoint(os.fspath(path), revision, self.kind).folder)

    def _load(self, folder: Path) -> None:
        """Load the model and what its inputs are made with, and set `width` and `max_text`."""
        import_model_classes()
        from transformers import CLIPModel

        self.model = load_key_model(CLIPModel, folder, "CLIP").to(self.device)
        config = self.model.config
        self.width = config.projection_dim
        if self.text_feature == "pooled" and config.text_config.hidden_size != self.width:
            raise UserError(
                f"keys.text_feature is pooled, but the CLIP in {self._source[0]} has pooled text of width "
                f"{config.text_config.hidden_size} and image keys of width {self.width}, which cannot share a "
                "prototype. Set keys.text_feature to projected."
            )
        self._load_processors(folder, config.text_config.max_position_embeddings)

    def _load_processors(self, folder: Path, context: int) -> None:
        from transformers import AutoImageProcessor, AutoTokenizer

        try:
            # PIL on every machine: keys would depend on whether torchvision is installed.
            self.processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise UserError(
                f"The {self.kind} model in {self._source[0]} has no usable image processor or tokenizer: {error}"
            ) from error
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.tokenizer.truncation_side = "right" if self.head else "left"
        self.max_text = min(self.tokenizer.model_max_length, context)

    def pixels(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Return the preprocessed images [B, 3, H, W] on the CPU; thread-safe."""
        return self.processor(images=[central(image) for image in images], return_tensors="pt")["pixel_values"]

    def image(self, images: Sequence[Image.Image] | torch.Tensor) -> torch.Tensor:
        """Return the image keys [B, K], float32 on the CPU, of RGB images or of the result of `pixels`."""
        pixels = images if isinstance(images, torch.Tensor) else self.pixels(images)
        with torch.no_grad(), self._matmuls():
            return projected(self.model.get_image_features(pixel_values=pixels.to(self.device))).float().cpu()

    def text(self, texts: Sequence[str]) -> torch.Tensor:
        """Return the text keys [B, K], float32 on the CPU; longer texts are truncated to CLIP's context."""
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_text, return_tensors="pt"
        ).to(self.device)
        inputs = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
        with torch.no_grad(), self._matmuls():
            if self.text_feature == "pooled":
                return self.model.text_model(**inputs).pooler_output.float().cpu()
            return projected(self.model.get_text_features(**inputs)).float().cpu()

    @contextlib.contextmanager
    def _matmuls(self) -> Iterator[None]:
        """Set torch's global precision of matrix products for the block, and restore it afterwards."""
        before = torch.get_float32_matmul_precision()
        try:
            # Not what `model.tf32` of the frozen model set: keys are compared with those of the prepared data.
            torch.set_float32_matmul_precision("high" if self.precision == "tf32" else "highest")
            yield
        finally:
            torch.set_float32_matmul_precision(before)

    def identity(self) -> dict[str, str]:
        """Return the identity of the CLIP and its settings; see `key_identity`."""
        return key_identity(*self._source, self.kind)


def key_identity(
    path: str | os.PathLike[str],
    revision: str | None = None,
    text_feature: TextFeature = "projected",
    text_truncation: Truncation = "head",
    kind: Kind = "clip",
) -> dict[str, str]:
    """Return the metadata of keys made with this model, from its files, without loading it.

    `weights_sha256`, `preprocessing_sha256` (which covers truncation and kind) and `text_feature` decide whether keys
    were made with it. `clip`, `revision`, `text_truncation` and `kind` are for readers. Raises UserError when the
    checkpoint cannot be found.
    """
    found = _checkpoint(os.fspath(path), revision, kind)
    folder = found.folder
    preprocessing = hashlib.sha256(f"encoding {ENCODING_VERSION}\n".encode())
    for name in _PREPROCESSING_FILES:
        if (folder / name).is_file():
            preprocessing.update(f"{name} {_sha256(folder / name)}\n".encode())
    if text_truncation != "head":  # left out for head, so that keys of versions without the setting stay valid
        preprocessing.update(f"text_truncation {text_truncation}\n".encode())
    if kind != "clip":
        preprocessing.update(f"kind {kind}\n".encode())
    weights = hashlib.sha256()
    for file in _weight_files(folder):
        weights.update(f"{file.name} {_sha256(file)}\n".encode())
    location = Path(path)
    return {
        # Only the name of an absolute path: the same prepared data should not differ between two machines.
        "clip": location.name if location.is_absolute() else os.fspath(path),
        "revision": found.commit or revision or "",
        "weights_sha256": weights.hexdigest(),
        "preprocessing_sha256": preprocessing.hexdigest(),
        "text_feature": text_feature,
        "text_truncation": text_truncation,
        **({} if kind == "clip" else {"kind": kind}),
    }


def keys_source(path: str, revision: str | None = None, kind: Kind = "clip") -> Source:
    """The location of the model that computes keys, as `pipeline.hub.snapshots` takes it."""
    wanted, kinds = {
        "clip": ("a CLIP checkpoint's", ("clip",)),
        "siglip": ("a SigLIP checkpoint's", ("siglip",)),
        "own": ("a multimodal model's", known_families()),
    }[kind]
    return Source(path, revision, "keys.path", wanted, kinds)


def _checkpoint(path: str, revision: str | None, kind: Kind) -> Snapshot:
    return checkpoint(keys_source(path, revision, kind))


def load_key_model(cls: Any, folder: Path, what: str) -> Any:
    """Load a frozen dual encoder in float32; UserError where its weights are unreadable or incomplete."""
    try:
        with deferring(), PlainMeta():
            model, report = cls.from_pretrained(
                folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"The {what} weights in {folder} cannot be loaded: {error}") from error
    if report["missing_keys"]:
        raise UserError(
            f"The {what} weights in {folder} lack {len(report['missing_keys'])} tensors, for example "
            f"{min(report['missing_keys'])}; they would be initialised randomly. Expected a complete {what} checkpoint."
        )
    return model.eval().requires_grad_(False)


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("model*.safetensors"))


def projected(output: object) -> torch.Tensor:
    """Return the projected features in the result of CLIP's or SigLIP's `get_*_features`."""
    # transformers 4 returns the projected features themselves, transformers 5 an output object that carries them.
    features = output if isinstance(output, torch.Tensor) else getattr(output, "pooler_output", None)
    assert isinstance(features, torch.Tensor), f"the model returned {type(output).__name__}"
    return features


def _sha256(path: Path) -> str:
    status = path.stat()
    return _sha256_of(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=64)
def _sha256_of(path: Path, size: int, changed: int) -> str:
    # Size and modification time are part of the cache key. Cached because the identity is needed once per split, and
    # hashing CLIP-L takes seconds.
    return sha256(path)
