"""Name and metadata of the file with a prepared split's routing keys; without torch, which reading it needs."""

from __future__ import annotations

KEYS_FILE = "keys.safetensors"
# Metadata of index.parquet and keys.safetensors: the fingerprint of their dataset.
FINGERPRINT = "dataset_fingerprint"
# Metadata that must be equal for keys to be comparable; the rest (id, revision, dtype) is for people.
IDENTITY_FIELDS = ("weights_sha256", "preprocessing_sha256", "text_feature")
FIX = "Run `python -m pipeline prepare RECIPE` to write it anew."


def first_line(error: BaseException) -> str:
    """The first line of an error's message, else its class."""
    return (str(error).splitlines() or [type(error).__name__])[0]
