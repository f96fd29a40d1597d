"""A server on the loopback with files at paths: it resumes, breaks off, redirects, refuses, changes, or is slow."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.loopback import Handler, serving


@dataclass
class Files:
    """The files by path, and how the server treats them; may be changed while it runs."""

    address: str = ""
    content: dict[str, bytes] = field(default_factory=dict)
    status: dict[str, int] = field(default_factory=dict)  # answers of this status instead
    moved: dict[str, str] = field(default_factory=dict)  # redirections
    breaks: dict[str, list[int]] = field(default_factory=dict)  # bytes after which each further answer ends early
    slow_s: dict[str, float] = field(default_factory=dict)  # seconds without a byte in the middle
    no_ranges: bool = False
    no_sizes: bool = False
    asked: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, Range

    def json(self, path: str, content: object) -> None:
        """Have JSON at a path."""
        self.content[path] = json.dumps(content).encode()


@contextlib.contextmanager
def files() -> Iterator[Files]:
    """Serve files until the block ends."""
    served = Files()
    ended = threading.Event()

    class Serving(Handler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            path, asked = self.path, self.headers.get("Range", "")
            served.asked.append((self.command, path, asked))
            if path in served.moved:
                self.head(302, {"Location": served.moved[path], "Content-Length": "0"})
                return
            if path in served.status or path not in served.content:
                self.head(served.status.get(path, 404), {"Content-Length": "0"})
                return
            content = served.content[path]
            tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
            start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
            partial = bool(asked) and not served.no_ranges and self.headers.get("If-Range") == tag
            if partial and start >= len(content):
                self.head(416, {"Content-Range": f"bytes */{len(content)}", "Content-Length": "0"})
                return
            body = content[start:] if partial else content
            headers = {} if served.no_sizes else {"Content-Length": str(len(body))}
            headers |= {"ETag": tag, "Connection": "close"}
            if partial:
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.head(206 if partial else 200, headers)
            if self.command == "HEAD":
                return
            self.close_connection = True
            stops = served.breaks.get(path)
            if stops:
                body = body[: stops.pop(0)]
            half = len(body) // 2
            self.wfile.write(body[:half])
            self.wfile.flush()
            ended.wait(served.slow_s.get(path, 0.0))
            self.wfile.write(body[half:])

        do_GET = do_HEAD = answer

        def head(self, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()

    with serving(Serving, ended.set) as served.address:
        yield served
