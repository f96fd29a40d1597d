"""An adapter as an MLflow model. This file is the model's code, so nothing is pickled.

`mlflow.pyfunc.load_model("models:/nano-modalprompt@newest").predict(frame)` answers a frame with the columns `question`
and, optionally, `image` (bytes or base64 text) and `task`. With `model_config={"files": True}` an image may also be
the path of a file on this machine: only for callers who may read every image on it.
"""

from __future__ import annotations

import base64
import binascii
import json
from pathlib import Path
from typing import Any

from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

from pipeline.adapter.answering import Question, read_image
from pipeline.adapter.load import load_adapter
from pipeline.config.unfamiliar import UNFAMILIAR, Unfamiliar
from pipeline.data.image_limits import ImageLimits, plan_image
from pipeline.errors import UserError

OUTPUTS = ("answer", "selected", "similarity", "probability", "unfamiliar")  # as the registered signature names them


class AdapterModel(PythonModel):
    """Answers questions about images with an adapter and its frozen models.

    Where the frozen models have another location than recorded, pass model_config={"model": "...", "clip": "..."} to
    `load_model`. Its "files": true allows paths of files on this machine; it is off by default, because behind
    `mlflow models serve` any client could have any image on this machine described. "unfamiliar" is what becomes of
    questions that resemble no task, where it shall differ from the run's method.
    """

    def load_context(self, context: Any) -> None:
        config = context.model_config or {}
        self.answerer = load_adapter(
            context.artifacts["adapter"],
            config.get("model"),
            config.get("clip"),
            unfamiliar=mode_of(config.get("unfamiliar")),
        )
        self.opens_files = config.get("files") is True

    # Without annotations: MLflow would derive a schema from them, and the signature is registered explicitly.
    def predict(self, context, model_input, params=None):
        """A frame in the input's order: `answer`, `selected` (names, comma-separated), `similarity` (JSON), and, None
        where they are not known, `probability` (JSON) and `unfamiliar`."""
        import pandas

        if "question" not in getattr(model_input, "columns", ()):
            raise UserError(
                "the input has no column question; expected question and, if there are any, image and task."
            )
        answers = self.answerer.answer([question(row, self.opens_files) for row in model_input.to_dict("records")])
        rows = [
            {
                "answer": answer.text,
                "selected": ", ".join(answer.selected),
                "similarity": json.dumps(answer.similarity),
                "probability": None if answer.probability is None else json.dumps(answer.probability),
                "unfamiliar": answer.unfamiliar,
            }
            for answer in answers
        ]
        return pandas.DataFrame(rows, columns=list(OUTPUTS), index=model_input.index)


def mode_of(given: Any) -> Unfamiliar | None:
    """The mode in model_config, None where it has none; raises UserError for another text."""
    if given is not None and given not in UNFAMILIAR:
        raise UserError(f"unfamiliar in model_config is {given!r}; expected one of {', '.join(UNFAMILIAR)}.")
    mode: Unfamiliar | None = given
    return mode


def question(row: dict[str, Any], opens_files: bool = False) -> Question:
    """The question in a row of the frame; raises UserError for an image in an unexpected form."""
    image, task = row.get("image"), row.get("task")
    encoded: bytes | None
    if isinstance(image, bytes | bytearray):
        encoded = bytes(image)
    elif not isinstance(image, str) or not image:  # None, or pandas' NaN
        encoded = None
    elif opens_files and _is_file(image):
        encoded = read_image(image)
    else:
        try:
            encoded = base64.b64decode(image.partition(",")[2] if image.startswith("data:") else image, validate=True)
        except (binascii.Error, ValueError):
            # The same message whether or not such a file exists, so that callers cannot probe for files.
            found = f"image '{image[:60]}' is {'neither a file here nor' if opens_files else 'not'} base64"
            hint = "" if opens_files else '; paths need load_model(..., model_config={"files": True})'
            expected = "a path, bytes or base64 text" if opens_files else "bytes or base64 text"
            raise UserError(f"{found}; expected {expected}{hint}.") from None
    if encoded is not None and not opens_files:
        plan_image(encoded, ImageLimits())  # untrusted callers: check the header before decoding, as the service does
    return Question(str(row["question"]), encoded, task if isinstance(task, str) and task else None)


def _is_file(text: str) -> bool:
    """Whether the text is the path of a file; base64 may hold slashes and be longer than a path can be."""
    try:
        return Path(text).is_file()
    except (OSError, ValueError):
        return False


set_model(AdapterModel())
