"""A request's JSON in memory that is bounded by its size: long strings stay where they arrived, the rest is counted.

`json.loads` makes up to four bytes of every byte of a text with one emoji in it, and some seventy of every `[],`. Here
strings longer than any question (the data URIs of images) are left in the body and only named in what is parsed, and
what remains may hold so many bytes and values.
"""

from __future__ import annotations

import json
import secrets
from typing import Any

LONG = 1 << 17  # bytes as written; 8192 characters written as escaped surrogates have 98304
REST = 4 << 20  # bytes of everything but long strings
VALUES = 50_000
QUOTES = 200_000  # each costs a step in Python
WHITESPACE = b" \t\r\n"


class JsonBody:
    """The parsed body; of its strings, long ones read by `ascii_bytes` only.

    Raises ValueError for what is not JSON in UTF-8, OverflowError for what is too much; both with a sentence's part.
    """

    def __init__(self, body: bytes | bytearray) -> None:
        self._body = body
        # In front of the number that stands for a long string: nobody can have written it, and it is longer than what
        # may be said in any other field.
        self._mark = f"{secrets.token_hex(16)}{'-' * 300}"
        self._long: list[tuple[int, int]] = []
        rest = self._without_long_strings()
        try:
            self.value: Any = json.loads(rest.decode("utf-8-sig"))
        except UnicodeDecodeError:
            raise ValueError("it is not UTF-8") from None
        except RecursionError:
            raise OverflowError("it is nested too deeply") from None

    def is_long(self, text: Any) -> bool:
        """Whether a string of `value` is the name of a long one."""
        return isinstance(text, str) and text.startswith(self._mark)

    def beginning(self, text: str, characters: int = 20) -> str:
        """The first characters of a string, for messages."""
        if self.is_long(text):
            start, end = self._place(text)
            text = bytes(self._body[start : min(end, start + 6 * characters)]).decode("utf-8", "replace")
        return text[:characters]

    def ascii_bytes(self, text: str) -> bytes:
        """A string of `value` as bytes without whitespace; ValueError where it is not ASCII."""
        if not self.is_long(text):
            return text.encode("ascii").translate(None, WHITESPACE)
        start, end = self._place(text)
        raw = bytes(memoryview(self._body)[start:end])
        if not raw.isascii():
            raise ValueError("it has characters beyond ASCII")
        if b"\\" in raw:  # \/ and \u002B of some encoders, and line breaks
            raw = json.loads(b'"%b"' % raw).encode("ascii")
        return raw.translate(None, WHITESPACE)

    def _place(self, text: str) -> tuple[int, int]:
        return self._long[int(text.removeprefix(self._mark))]

    def _without_long_strings(self) -> bytearray:
        """The body with a name in place of each long string; raises OverflowError."""
        body, rest = self._body, bytearray()
        copied = at = quotes = values = 0
        while True:
            opening = body.find(b'"', at)
            outside = len(body) if opening < 0 else opening
            values += sum(body.count(sign, at, outside) for sign in (b",", b"[", b"{"))
            if values > VALUES:
                raise OverflowError(f"it has more than {VALUES} values")
            if opening < 0:
                break
            closing, steps = self._end_of_string(opening + 1, QUOTES - quotes)
            quotes += steps
            if closing - opening - 1 > LONG:
                rest += body[copied : opening + 1]
                rest += f"{self._mark}{len(self._long)}".encode()
                self._long.append((opening + 1, closing))
                copied = closing
            at = closing + 1
            if len(rest) + at - copied > REST:
                break  # refused below, with what is left counted in
        if len(rest) + len(body) - copied > REST:
            raise OverflowError(f"it has more than {REST >> 20} MiB beside its images")
        rest += body[copied:]
        return rest

    def _end_of_string(self, start: int, most: int) -> tuple[int, int]:
        """Where the string that begins at `start` is closed, and how many quotes were looked at."""
        body, begin = self._body, start
        for steps in range(1, most + 1):
            closing = body.find(b'"', begin)
            if closing < 0:
                raise ValueError("a string is not closed")
            if closing == begin or body[closing - 1] != ord("\\"):
                return closing, steps
            before = body[begin:closing]
            if (len(before) - len(before.rstrip(b"\\"))) % 2 == 0:
                return closing, steps
            begin = closing + 1  # it was escaped
        raise OverflowError(f"it has more than {QUOTES} quotation marks")
