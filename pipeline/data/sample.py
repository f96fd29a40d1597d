"""A sample: a question about at most one image, with its answer, as sources yield it and shards hold it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from pipeline.data.pictures import decode_image


@dataclass(frozen=True, slots=True)
class Sample:
    """A training or test sample; `image` is the content of the image file, None for a question without one."""

    id: str
    image: bytes | None
    question: str
    answer: str
    meta: dict[str, Any] = field(default_factory=dict)

    def picture(self) -> Image.Image | None:
        """Return the upright RGB picture (see `decode_image`), or None for a text-only sample."""
        return None if self.image is None else decode_image(self.image)

    def to_json(self) -> bytes:
        """Return all fields but the image as canonical UTF-8 JSON: equal samples give equal bytes."""
        record = {"id": self.id, "question": self.question, "answer": self.answer, "meta": self.meta}
        return json.dumps(record, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode("utf-8")

    @classmethod
    def from_json(cls, record: bytes, image: bytes | None) -> Sample:
        """Rebuild a sample from `to_json` and the image; raises ValueError or KeyError for another content."""
        fields = json.loads(record)
        return cls(
            id=fields["id"], image=image, question=fields["question"], answer=fields["answer"], meta=fields["meta"]
        )
