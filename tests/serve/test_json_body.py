"""Bodies as JSON within limits: what is parsed is what json.loads gives, and what would take much is refused."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from pipeline.serve.json_body import LONG, QUOTES, REST, VALUES, JsonBody

LONGER = LONG + 1


@pytest.mark.parametrize("seed", range(20))
def test_what_is_parsed_is_what_was_written(seed: int) -> None:
    chance = random.Random(seed)

    def value(depth: int) -> Any:
        kind = chance.randrange(7 if depth else 5)
        if kind == 5:
            return [value(depth - 1) for _ in range(chance.randrange(5))]
        if kind == 6:
            return {text(): value(depth - 1) for _ in range(chance.randrange(5))}
        return [None, True, chance.random(), chance.randrange(-9, 9), text()][kind]

    def text() -> str:
        letters = ['"', "\\", "\\\\", "/", ",", "[", "{", "é", "\N{GRINNING FACE}", "\n", "a"]
        return "".join(chance.choices(letters, k=chance.randrange(12)))

    wanted = value(4)
    for ascii_only in (True, False):
        assert JsonBody(json.dumps(wanted, ensure_ascii=ascii_only).encode()).value == wanted


def test_a_long_string_stays_in_the_body_and_is_read_from_it() -> None:
    body = JsonBody(json.dumps({"a": "x" * LONGER, "b": ["y" * LONGER, "short"]}).encode())
    first, second = body.value["a"], body.value["b"][0]
    assert body.is_long(first) and body.is_long(second) and not body.is_long("short")
    assert (body.ascii_bytes(first), body.ascii_bytes(second)) == (b"x" * LONGER, b"y" * LONGER)
    assert (body.beginning(second), body.beginning("short")) == ("y" * 20, "short")
    assert body.value["b"][1] == "short"


def test_the_name_of_a_long_string_cannot_be_written_by_a_caller() -> None:
    first = JsonBody(json.dumps(["x" * LONGER]).encode())
    assert not JsonBody(json.dumps(first.value).encode()).is_long(first.value[0])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"[" + b"[]," * VALUES + b"0]", "values"),
        (b'["' + b'\\"' * (QUOTES + 1) + b'"]', "quotation marks"),
        (b" " * REST + b"[]", "MiB beside its images"),
        (b'["' + b'","'.join([b"a" * (LONG - 10)] * 40) + b'"]', "MiB beside its images"),
        (b"[" * 20000 + b"]" * 20000, "nested too deeply"),
    ],
    ids=["values", "quotes", "spaces", "texts", "depth"],
)
def test_what_would_take_much_memory_is_refused(text: bytes, sentence: str) -> None:
    with pytest.raises(OverflowError, match=sentence):
        JsonBody(text)


@pytest.mark.parametrize(
    "text", [b"", b"{", b'["', b'["\\"]', b'"' + b"x" * LONGER, b"\xff", '{"a": 1}'.encode("utf-16")]
)
def test_what_is_not_json_in_utf8_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError):
        JsonBody(text)


def test_a_byte_order_mark_is_skipped() -> None:
    assert JsonBody(b"\xef\xbb\xbf[1]").value == [1]
