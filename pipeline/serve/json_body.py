"""Parses a request's JSON in bounded memory.

`json.loads` takes up to four bytes per byte of a text that contains one emoji, and about seventy per `[],`. So strings
longer than any question (data URIs of images) stay in the body and are replaced by placeholders before parsing, and
the rest is limited in bytes and in number of values.
"""

from __future__ import annotations

import json
import secrets
from typing import Any

LONG = 1 << 17  # bytes as written; a question of 8192 characters, as escaped surrogate pairs, has 98304
REST = 4 << 20  # bytes of everything but long strings
VALUES = 50_000
QUOTES = 200_000  # each takes one step of a Python loop
WHITESPACE = b" \t\r\n"


class JsonBody:
    """A parsed body; its long strings can be read by `ascii_bytes` only.

    Raises ValueError where it is not JSON in UTF-8, OverflowError where it exceeds a limit; the messages are clauses
    that complete the error's sentence.
    """

    def __init__(self, body: bytes | bytearray) -> None:
        self._body = body
        # Prefix of the placeholders: random, so that no client can write one, and longer than the values that other
        # fields accept.
        self._mark = f"{secrets.token_hex(16)}{'-' * 300}"
        self._long: list[tuple[int, int]] = []
        rest = self._without_long_strings()
        try:
            self.value: Any = json.loads(rest.decode("utf-8-sig"))
        except UnicodeDecodeError:
            raise ValueError("it is not UTF-8") from None
        except RecursionError:
            raise OverflowError("it is nested too deeply") from None

    @property
    def nbytes(self) -> int:
        """Bytes of the body."""
        return len(self._body)

    def is_long(self, text: Any) -> bool:
        """Whether a string of `value` is the placeholder of a long one."""
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
        if b"\\" in raw:  # some encoders write \/ and \u002B, and line breaks
            raw = json.loads(b'"%b"' % raw).encode("ascii")
        return raw.translate(None, WHITESPACE)

    def written(self, value: Any) -> bytes:
        """A value made of parts of `value` as JSON, long strings as the body has them."""
        rest = json.dumps(value, separators=(",", ":")).encode()
        pieces = rest.split(b'"' + self._mark.encode())  # the mark is ASCII, which JSON writes as it is
        body = memoryview(self._body)
        out: list[bytes | memoryview] = [pieces[0]]
        for piece in pieces[1:]:
            number, _, following = piece.partition(b'"')
            start, end = self._long[int(number)]
            out += [b'"', body[start:end], b'"', following]
        return b"".join(out)

    def _place(self, text: str) -> tuple[int, int]:
        return self._long[int(text.removeprefix(self._mark))]

    def _without_long_strings(self) -> bytearray:
        """The body with a placeholder for each long string; raises OverflowError."""
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
                break  # refused below, where the rest is counted too
        if len(rest) + len(body) - copied > REST:
            raise OverflowError(f"it has more than {REST >> 20} MiB beside its images")
        rest += body[copied:]
        return rest

    def _end_of_string(self, start: int, most: int) -> tuple[int, int]:
        """Position of the quote that closes the string at `start`, and the number of quotes examined."""
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
            begin = closing + 1  # an escaped quote
        raise OverflowError(f"it has more than {QUOTES} quotation marks")
