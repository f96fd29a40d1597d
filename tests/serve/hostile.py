"""Requests made to take memory: images that decode to much, bodies that parse to much, texts that become much."""

from __future__ import annotations

import base64
import io
import json
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from PIL import Image

BODY = 20_000_000  # bytes of the largest
MODEL = "fuzzed"


def requests(seed: int, number: int) -> Iterator[tuple[str, bytes]]:
    """So many bodies with a name each; every kind comes in turn, its sizes by chance."""
    chance = random.Random(seed)
    kinds = [*IMAGES.items(), *BODIES.items()]
    for place in range(number):
        name, make = kinds[place % len(kinds)]
        made = make(chance)
        body = with_image(made, chance) if name in IMAGES else made
        yield name, body[:BODY]


def with_image(encoded: bytes, chance: random.Random) -> bytes:
    """A chat request about an image."""
    address = "data:image/png;base64," + base64.b64encode(encoded).decode()
    parts = [
        {"type": "text", "text": "what?" * chance.randint(1, 20)},
        {"type": "image_url", "image_url": {"url": address}},
    ]
    return chat([{"role": "user", "content": parts}])


def chat(messages: list[Any], **fields: Any) -> bytes:
    return json.dumps({"model": MODEL, "messages": messages, "max_tokens": 2, **fields}).encode()


def _sides(chance: random.Random) -> tuple[int, int]:
    """Of all shapes: phone photographs, the most pixels, lines, and one pixel."""
    return chance.choice(
        [
            (4032, 3024),
            (4096, 4096),
            (4000, 4000),
            (20000, 10),
            (10, 20000),
            (20000, 50),
            (100000, 160),
            (1600000, 10),
            (65000, 1),
            (1, 65000),
            (12000, 1400),
            (1, 1),
            (chance.randint(1, 5000), chance.randint(1, 5000)),
        ]
    )


def _saved(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def _noise(size: tuple[int, int], mode: str, chance: random.Random) -> Image.Image:
    """A picture of this mode that is no plain colour; made small and enlarged, for the tests have memory limits too."""
    small = Image.effect_noise((16, 16), 80).resize(size, Image.Resampling.NEAREST)
    return small if mode == "L" else small.convert(mode) if mode != "RGBA" else Image.merge("RGBA", [small] * 4)


def _png(chance: random.Random) -> bytes:
    mode = chance.choice(["1", "L", "P", "RGB", "RGBA", "LA", "I;16"])
    size = _sides(chance)
    if mode in ("1", "L", "P"):
        return _saved(Image.new(mode, size), "PNG")
    if mode in ("LA", "I;16"):
        return _raw_png(*size, depth=16 if mode == "I;16" else 8, kind=4 if mode == "LA" else 0)
    return _raw_png(*size, depth=chance.choice([8, 16]), kind=2 if mode == "RGB" else 6)


def _raw_png(
    width: int, height: int, depth: int = 8, kind: int = 6, interlaced: bool = False, more: bytes = b""
) -> bytes:
    """A PNG of zeros, compressed row by row, so that its making takes no memory."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind]
    packer, data = zlib.compressobj(1), bytearray()
    row = bytes(1 + width * channels * depth // 8)
    for _ in range(height):
        data += packer.compress(row)
    data += packer.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, interlaced)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + more + _chunk(b"IDAT", bytes(data)) + _chunk(b"IEND", b"")


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _text_bomb(chance: random.Random) -> bytes:
    """A small PNG whose comments unpack to a megabyte each."""
    text = zlib.compress(bytes(1_000_000), 9)
    return _raw_png(
        32, 32, more=b"".join(_chunk(b"zTXt", b"k%d\0\0" % n + text) for n in range(chance.choice([8, 500])))
    )


def _lying_png(chance: random.Random) -> bytes:
    """A header of more pixels than follow, or of impossibly many."""
    size = chance.choice([(4096, 4096), (60000, 60000), (2**31 - 1, 2**31 - 1)])
    whole = _raw_png(8, 8)
    return whole.replace(whole[8:33], _chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 6, 0, 0, 0)))


def _jpeg(chance: random.Random) -> bytes:
    mode = chance.choice(["L", "RGB", "CMYK"])
    size = tuple(min(side, 65000) for side in _sides(chance))
    options = {"progressive": chance.random() < 0.6, "subsampling": 0} if mode == "RGB" else {"progressive": True}
    picture = Image.new(mode, (size[0], size[1]), 3 if mode == "L" else None)
    return _saved(picture, "JPEG", quality=30, **options)


def _many_scans(chance: random.Random) -> bytes:
    """A progressive JPEG whose scans come again and again."""
    whole = _saved(Image.new("RGB", (4000, 4000)), "JPEG", progressive=True, subsampling=0)
    last = whole.rindex(b"\xff\xda")
    return whole[:last] + whole[last:-2] * chance.choice([5, 300]) + whole[-2:]


def _webp(chance: random.Random) -> bytes:
    size = tuple(min(side, 16383) for side in _sides(chance))
    return _saved(Image.new(chance.choice(["RGB", "RGBA"]), (size[0], size[1])), "WEBP", lossless=True, method=0)


def _animation(chance: random.Random) -> bytes:
    kind = chance.choice(["GIF", "WEBP", "PNG"])
    side = chance.choice([64, 2000])
    frames = [
        Image.new("P" if kind == "GIF" else "RGB", (side, side), number) for number in range(40 if side < 100 else 4)
    ]
    return _saved(frames[0], kind, save_all=True, append_images=frames[1:])


def _gif(chance: random.Random) -> bytes:
    """A GIF whose screen is as large as may be, with a frame of a pixel or one beyond the screen."""
    screen = chance.choice([(4096, 4096), (65535, 65535), (65535, 200), (10, 10)])
    frame = chance.choice([(1, 1), (4096, 4096), (65535, 255)])
    head = b"GIF89a" + struct.pack("<HHBBB", *screen, 0x80, 0, 0) + bytes(6)
    return head + b"\x2c" + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x02\x02\x4c\x01\x00\x3b"


def _bmp(chance: random.Random) -> bytes:
    if chance.random() < 0.5:
        return _saved(Image.new(chance.choice(["1", "L", "RGB"]), (2000, chance.randint(1, 2500))), "BMP")
    width, height = chance.choice([(4096, 4096), (60000, 200)])
    offset = 14 + 40 + 1024  # run-length coded: two bytes for 255 pixels
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, 0, 0, 0, 256, 0)
    runs = b"\xff\x01" * chance.choice([10, 70000])
    return b"BM" + struct.pack("<IHHI", offset + len(runs), 0, 0, offset) + info + bytes(1024) + runs


def _other_format(chance: random.Random) -> bytes:
    kind = chance.choice(["TIFF", "ICO", "PPM", "TGA", "JPEG2000"])
    size = (256, 256) if kind == "ICO" else (3000, 2000)
    return _saved(Image.new("RGB", size), kind)


def _damaged(chance: random.Random) -> bytes:
    whole = bytearray(chance.choice([_png, _jpeg, _webp, _gif, _animation])(chance))
    for _ in range(chance.randint(1, 30)):
        whole[chance.randrange(len(whole))] = chance.randrange(256)
    return bytes(whole[: chance.randint(1, len(whole))])


def _deep(chance: random.Random) -> bytes:
    opening, closing = chance.choice([(b"[", b"]"), (b'{"a":', b"}")])
    depth = chance.choice([500, 900, 5000, 2_000_000])
    return opening * depth + b"1" + closing * depth


def _many_values(chance: random.Random) -> bytes:
    piece = chance.choice([b"[],", b"{},", b"0,", b"1.5,", b'"",', b'{"a":[]},', b"null,"])
    number = BODY // len(piece) // chance.choice([1, 50]) - 40
    return b'{"model": "%s", "messages": [' % MODEL.encode() + piece * number + b"0]}"


def _many_messages(chance: random.Random) -> bytes:
    message = {"role": "user", "content": chance.choice(["what?", "é" * 2000, "\N{GRINNING FACE}" * 500])}
    return chat([message] * chance.choice([200, 5000]))


def _long_text(chance: random.Random) -> bytes:
    """Texts that take four bytes a character, or that are written with six or twelve for one."""
    letter = chance.choice(["a", "é", "\N{GRINNING FACE}", "\\\\", "\\n", "\\u00e9", "\\ud83d\\ude00", '\\"'])
    text = letter * (chance.choice([5000, 100_000, BODY]) // len(letter.encode()))
    if chance.random() < 0.5:
        text = "\N{GRINNING FACE}" + text
    return b'{"model": "%s", "messages": [{"role": "user", "content": "%s"}]}' % (
        MODEL.encode(),
        text.encode()[: BODY - 80],
    )


def _long_fields(chance: random.Random) -> bytes:
    value = chance.choice(["x" * 1_000_000, ["y" * 1000] * 1000, {"k" * 100_000: 1}, 10**4000, [[[]]] * 1000])
    name = chance.choice(["model", "n", "max_tokens", "stop", "task", "stream", "tools", "unknown", "stream_options"])
    return chat([{"role": "user", "content": "?"}], **{name: value})


def _number(chance: random.Random) -> bytes:
    digits = chance.choice([b"1" * 1_000_000, b"1." + b"3" * 3_000_000, b"1e999999", b"-Infinity", b"NaN"])
    return b'{"model": "%s", "messages": [], "n": %s}' % (MODEL.encode(), digits)


def _base64(chance: random.Random) -> bytes:
    """A data URI as long as a body may be, of what is no image or no base64, with escapes or spaces."""
    data = chance.choice(["A", "\\/", "A A A A ", "\\n", "\\u002f", "é", "=", "!"])
    address = "data:image/png;base64," + data * (chance.choice([1000, BODY - 300]) // len(data.encode()))
    part = f'{{"type": "image_url", "image_url": {{"url": "{address}"}}}}'
    return f'{{"model": "{MODEL}", "messages": [{{"role": "user", "content": [{part}]}}]}}'.encode()


def _many_images(chance: random.Random) -> bytes:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * chance.choice([100, 150_000])}}
    texts = {"type": "text", "text": "?"}
    if chance.random() < 0.5:
        return chat([{"role": "user", "content": [texts] + [part] * 100}])
    return chat([{"role": "user", "content": [texts, part]}] * 100)


def _bytes(chance: random.Random) -> bytes:
    return chance.choice([chance.randbytes, lambda size: bytes(size), lambda size: b'"' * size])(
        chance.choice([10, 1_000_000, BODY])
    )


Make = Callable[[random.Random], bytes]
IMAGES: dict[str, Make] = {
    "png": _png,
    "png texts": _text_bomb,
    "lying png": _lying_png,
    "jpeg": _jpeg,
    "scans": _many_scans,
    "webp": _webp,
    "animation": _animation,
    "gif": _gif,
    "bmp": _bmp,
    "other": _other_format,
    "damaged": _damaged,
}
BODIES: dict[str, Make] = {
    "deep": _deep,
    "values": _many_values,
    "messages": _many_messages,
    "text": _long_text,
    "fields": _long_fields,
    "number": _number,
    "base64": _base64,
    "images": _many_images,
    "bytes": _bytes,
}
