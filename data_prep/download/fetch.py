"""Fetches one file over HTTP: resumed, verified, and renamed to its name when it is whole.

Proxies are those of the environment (`https_proxy`, `no_proxy`). Beside an unfinished file NAME.part, NAME.part.json
says what its server called that version; another one is begun anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import Interrupted, UserError
from pipeline.files.atomic import sha256, sync_folder

BLOCK = 1 << 20
TIMEOUT_S = 60.0
TRIES = 5
# Answers that may be others a little later.
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
_LOST = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)


@dataclass(frozen=True)
class Patience:
    """How long a server is waited for."""

    timeout_s: float = TIMEOUT_S  # without a byte
    tries: int = TRIES  # that bring nothing
    pause_s: float = 2.0  # before the second one; doubled before each further one


PATIENCE = Patience()


@dataclass(frozen=True)
class Wanted:
    """A file that is to be fetched, and what is known of it."""

    url: str
    target: Path
    size: int | None = None
    sha256: str | None = None
    known_from: str = ""  # where size and sha256 are said, for messages


@dataclass(frozen=True)
class Fetched:
    """A file that is there, whole."""

    size: int
    sha256: str


class _NoDowngrade(urllib.request.HTTPRedirectHandler):
    """Follows redirections, but not from https to http, where anybody on the way may change the content."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            raise UserError(
                f"{req.full_url} leads to {newurl.split(':')[0]}, which is not encrypted; fetch it by hand."
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def opened(url: str, patience: Patience, headers: dict[str, str] | None = None, method: str = "GET") -> Any:
    """The response of a server; raises what urllib raises."""
    opener = urllib.request.build_opener(_NoDowngrade)
    sent = {"User-Agent": "continual-prompts", "Accept-Encoding": "identity", **(headers or {})}
    return opener.open(urllib.request.Request(url, headers=sent, method=method), timeout=patience.timeout_s)


@contextlib.contextmanager
def reading(url: str, patience: Patience) -> Iterator[Any]:
    """The response of a server to read at once; raises as `fetch` does, without trying again."""
    with _errors(url), opened(url, patience) as response:
        yield response


def size_of(url: str, patience: Patience) -> int | None:
    """The size that a server tells for a file, None where it tells none; raises as `fetch` does."""
    with _errors(url), opened(url, patience, method="HEAD") as response:
        length = response.headers.get("Content-Length", "")
        return int(length) if length.isdecimal() else None


def fetch(wanted: Wanted, tell: Callable[[int, int | None], None], patience: Patience = PATIENCE) -> Fetched:
    """Fetch a file, or go on where an earlier call was ended; returns its size and hash.

    `tell` is called with the bytes that are there and the bytes of the whole, where known. Raises UserError where the
    server refuses or the content is not the expected one, and Interrupted where it cannot be reached: the same call
    goes on.
    """
    part = wanted.target.with_name(f"{wanted.target.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another process is fetching {wanted.target}; wait until it has ended.") from None
        fruitless = 0
        while True:
            before = file.tell()
            try:
                with _errors(wanted.url):
                    done = _continue(wanted, file, part, tell, patience)
                if done:
                    break
            except UserError:
                if not file.tell():
                    part.unlink(missing_ok=True)
                raise
            except Interrupted:
                fruitless = 0 if file.tell() > before else fruitless + 1
                if fruitless >= patience.tries:
                    raise
                time.sleep(patience.pause_s * 2 ** max(0, fruitless - 1))
        found = verified(wanted, part)
        os.fsync(file.fileno())  # before the rename: after a power cut the name must not have another content
        part.replace(wanted.target)
    _state(part).unlink(missing_ok=True)
    sync_folder(wanted.target.parent)
    return found


def verified(wanted: Wanted, path: Path) -> Fetched:
    """Size and hash of a file; UserError, and the file is removed, where they are not the expected ones."""
    found = Fetched(path.stat().st_size, sha256(path))
    for name, expected in (("size", wanted.size), ("sha256", wanted.sha256)):
        if expected is not None and getattr(found, name) != expected:
            path.unlink()
            _state(path).unlink(missing_ok=True)
            raise UserError(
                f"{wanted.url} has the {name} {getattr(found, name)}, expected {expected} ({wanted.known_from}); the "
                "file was removed. Repeat the command; if it is the same again, the owner has changed the file."
            )
    return found


def _continue(
    wanted: Wanted, file: Any, part: Path, tell: Callable[[int, int | None], None], patience: Patience
) -> bool:
    """Append what is missing; False: the part was of another version and is empty now."""
    there, state = file.tell(), _read_state(part)
    headers = {"Range": f"bytes={there}-", "If-Range": state["version"]} if there and state.get("version") else {}
    if there and not headers:
        _empty(file)
        there = 0
    try:
        response = opened(wanted.url, patience, headers)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not there:
            raise
        if there == state.get("whole"):  # all of it had arrived before it was renamed
            return True
        _empty(file)
        return False
    with response:
        if there and (response.status != 206 or not _begins(response, there)):
            _empty(file)
            there = 0
            if response.status == 206:
                return False
        length = response.headers.get("Content-Length", "")
        whole = there + int(length) if length.isdecimal() else None
        if wanted.size is not None and whole not in (None, wanted.size):
            raise UserError(f"{wanted.url} has {whole} bytes, expected {wanted.size} ({wanted.known_from}).")
        # Not flushed to the disk: without it, or with half of it, the file is begun anew.
        _state(part).write_text(json.dumps({"version": _version(response), "whole": whole}), encoding="utf-8")
        while block := response.read(BLOCK):
            file.write(block)
            tell(file.tell(), whole)
        file.flush()
        if whole is not None and file.tell() != whole:
            raise ConnectionError(f"{file.tell()} of {whole} bytes arrived")
    return True


def _begins(response: Any, there: int) -> bool:
    return str(response.headers.get("Content-Range", "")).startswith(f"bytes {there}-")


def _version(response: Any) -> str | None:
    """What the server calls this version of the file: a strong ETag, else the time of its last change."""
    tag = response.headers.get("ETag")
    found: str | None = tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified")
    return found


def _empty(file: Any) -> None:
    file.truncate(0)
    file.seek(0)


def _state(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _read_state(part: Path) -> dict[str, Any]:
    try:
        found = json.loads(_state(part).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@contextlib.contextmanager
def _errors(url: str) -> Iterator[None]:
    """Turns what urllib raises into sentences: UserError for a refusal, Interrupted for what may work later."""
    again = "The same command goes on from there."
    try:
        yield
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in TRANSIENT:
            raise Interrupted(f"{url} answered {error.code} ({error.reason}). {again}") from None
        raise UserError(
            f"{url} answered {error.code} ({error.reason}); expected a file. Look at the owner's page for its new "
            "address, or whether it needs an account."
        ) from None
    except _LOST as error:
        reason = getattr(error, "reason", None) or error
        raise Interrupted(f"{url} could not be fetched ({reason}). {again}") from None
