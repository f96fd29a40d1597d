"""The special tokens of prompt sets, and their place in a tokenizer's files."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.files.atomic import write_json

# A private-use character, which every token of a set begins and ends with. A tokenizer is a function of the text alone,
# so it would make the token of its string whoever wrote it; the chat template replaces this one character in all that
# it prints of the messages (see `template`), and no text without it contains such a token. A service that routes
# replaces it itself before, so that the text it routes on is the one that is answered.
MARK = "\U0010e5e7"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
HIDDEN_MARK = (MARK, REPLACEMENT)
ARGUMENT = "prompt_sets"  # what the template calls the names of the selected sets
IDENTITY = "prompt_sets_of"  # what it calls the identity that a caller expects the sets to have


@dataclass(frozen=True)
class Probe:
    """A way to ask an exported checkpoint for sets, and the tokens that its template then has to insert."""

    arguments: dict[str, Any]  # of the chat template
    messages: list[dict[str, Any]]  # before those of the conversation
    ids: list[int]


class Added(ABC):
    """Tokens that an export adds to a vocabulary, from the id `first` on, and how its chat template prints them."""

    first: int
    identity: str  # what has to match between the checkpoint and whoever asks it

    @abstractmethod
    def texts(self) -> list[str]:
        """All tokens as text, by id."""

    @property
    @abstractmethod
    def hidden(self) -> tuple[str, str]:
        """The text without which no message contains one of the tokens, and what the template replaces it by."""

    @abstractmethod
    def inserted(self) -> str:
        """The lines of the template that set `set_tokens`, the text that is inserted."""

    @abstractmethod
    def probes(self) -> list[Probe]:
        """Requests by which an export is proved, the first without sets."""

    @property
    def count(self) -> int:
        return len(self.texts())

    @property
    def end(self) -> int:
        """The id behind the last one."""
        return self.first + self.count


@dataclass(frozen=True)
class SetTokens(Added):
    """The tokens of T sets of L vectors: set t has the ids from `first` + t L on; `identity` is that of the sets."""

    names: Sequence[str]
    length: int
    first: int
    identity: str = ""

    @property
    def count(self) -> int:
        return len(self.names) * self.length

    @property
    def hidden(self) -> tuple[str, str]:
        return HIDDEN_MARK

    def inserted(self) -> str:
        numbers = quoted({name: number for number, name in enumerate(self.names)})
        mark = quoted(MARK)
        return f"""{{#- The argument {ARGUMENT} names the prompt sets of this conversation, the most similar one last.
Their tokens contain a private-use character, which is replaced in everything that messages contain. -#}}
{{%- set set_numbers = {numbers} %}}
{{%- set set_tokens %}}
{{%- for name in {ARGUMENT} | default([], true) %}}
{{%- if name not in set_numbers %}}{{{{ raise_exception("There is no prompt set " ~ name) }}}}{{% endif %}}
{{%- for row in range({self.length}) %}}{{{{ {mark} ~ "set_" ~ set_numbers[name] ~ "_" ~ row ~ {mark} }}}}{{% endfor %}}
{{%- endfor %}}
{{%- endset %}}"""

    def probes(self) -> list[Probe]:
        names = list(self.names)
        chosen = list[list[str]](([], names[:1], names[-2:]))
        return [Probe({ARGUMENT: some}, [], [i for name in some for i in self.ids(name)]) for some in chosen]

    def ids(self, name: str) -> list[int]:
        """The tokens of one set, in order."""
        start = self.first + list(self.names).index(name) * self.length
        return list(range(start, start + self.length))

    def texts(self) -> list[str]:
        return [token_text(number, row) for number in range(len(self.names)) for row in range(self.length)]


def token_text(number: int, row: int) -> str:
    """The token of one vector of a set, as text."""
    return f"{MARK}set_{number}_{row}{MARK}"


def identity_of(names: Sequence[str], vectors: Tensor, dtype: torch.dtype) -> str:
    """Sixteen digits that other sets, names, orders or precisions change; `vectors` is [T, L, D]."""
    content = hashlib.sha256(json.dumps([list(names), list(vectors.shape), str(dtype)]).encode())
    content.update(vectors.to(dtype).contiguous().view(torch.uint8).numpy().tobytes())
    return content.hexdigest()[:16]


def next_token(tokenizer: Any) -> int:
    """The id that the next added token gets: behind all others."""
    return max(tokenizer.get_vocab().values()) + 1


def refuse_marks(tokenizer: Any, place: str) -> None:
    """Raise UserError where a tokenizer has tokens of prompt sets already."""
    if any(MARK in token for token in tokenizer.get_vocab()):
        raise UserError(
            f"The vocabulary of '{place}' has prompt sets already; expected the frozen model as it was published."
        )


def quoted(value: Any) -> str:
    """A value as Jinja and JSON write it."""
    return json.dumps(value, ensure_ascii=False)


def add_to_files(tokenizer: Any, tokens: Added, folder: Path) -> None:
    """Add the tokens to tokenizer.json and tokenizer_config.json of a checkpoint's folder.

    The files are edited rather than saved by the installed transformers, whose versions write them differently.
    """
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    known = [token["id"] for token in content.get("added_tokens") or []]
    if max(known, default=-1) != tokens.first - 1:  # some added tokens are in tokenizer_config.json alone, or no file
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        content["truncation"] = content["padding"] = None
    entries = [{"id": tokens.first + place, **_added(text)} for place, text in enumerate(tokens.texts())]
    content["added_tokens"] = [*(content.get("added_tokens") or []), *entries]
    write_json(path, content)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    settings.pop("chat_template", None)
    if "added_tokens_decoder" in settings:
        settings["added_tokens_decoder"] |= {
            str(tokens.first + place): _added(text) for place, text in enumerate(tokens.texts())
        }
    write_json(path, settings)


def _added(text: str) -> dict[str, Any]:
    """A special token that is matched in the text as it is given, before any normalisation."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"content": text, **flags, "special": True}
