"""The file with a prepared split's CLIP keys: its name and what must stand in it. What reads it imports torch."""

from __future__ import annotations

KEYS_FILE = "keys.safetensors"
# In the metadata of index.parquet and keys.safetensors: the dataset they were made for.
FINGERPRINT = "dataset_fingerprint"
# What makes two key files comparable; the other metadata (id, revision, dtype) only tells a person where they are from.
IDENTITY_FIELDS = ("weights_sha256", "preprocessing_sha256", "text_feature")
FIX = "Run `python -m pipeline prepare RECIPE` to write it anew."


def first_line(error: BaseException) -> str:
    """What an error of a library says first."""
    return (str(error).splitlines() or [type(error).__name__])[0]
