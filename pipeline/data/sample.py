"""One question about at most one image, with its answer: what every source yields and every shard holds."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from pipeline.data.pictures import decode_image


@dataclass(frozen=True, slots=True)
class Sample:
    """One training or test item; `image` holds the encoded file bytes, None when the question stands alone."""

    id: str
    image: bytes | None
    question: str
    answer: str
    meta: dict[str, Any] = field(default_factory=dict)

    def picture(self) -> Image.Image | None:
        """Return the upright RGB picture (see `decode_image`), or None for a text-only sample."""
        return None if self.image is None else decode_image(self.image)

    def to_json(self) -> bytes:
        """Return everything but the image as canonical UTF-8 JSON: equal samples give equal bytes."""
        record = {"id": self.id, "question": self.question, "answer": self.answer, "meta": self.meta}
        return json.dumps(record, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode("utf-8")

    @classmethod
    def from_json(cls, record: bytes, image: bytes | None) -> Sample:
        """Rebuild a sample from `to_json` and the image bytes; raises ValueError or KeyError when it is not one."""
        fields = json.loads(record)
        return cls(
            id=fields["id"], image=image, question=fields["question"], answer=fields["answer"], meta=fields["meta"]
        )
