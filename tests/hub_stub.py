"""A Hub on the loopback: it serves one repository from a folder, or does not answer in one of several ways."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.loopback import Handler, serving

COMMIT = "a" * 40
REPOSITORY = "owner/model"
FAULTS = ("hangs", "429", "500", "closes")


@dataclass
class Stub:
    """What was asked for so far; `fault` may be changed while the server runs."""

    address: str
    fault: str = ""
    faulty: str = ""  # only requests with this in their path meet the fault
    asked: list[str] = field(default_factory=list)
    # Which process asked for each: what its HF_HUB_USER_AGENT_ORIGIN says, "" where that is not set.
    askers: list[str] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)


@contextlib.contextmanager
def hub_of(folder: Path, fault: str = "", faulty: str = "") -> Iterator[Stub]:
    """Serve a folder's files as REPOSITORY at one commit; `fault` is one of FAULTS."""

    class Hub(Handler):
        def answer(self) -> None:
            stub.asked.append(f"{self.command} {self.path}")
            stub.askers.append(self.headers.get("User-Agent", "").partition("origin/")[2])
            if stub.fault and stub.faulty in self.path:
                self.fail()
            elif self.path.startswith(f"/api/models/{REPOSITORY}"):
                siblings = [{"rfilename": path.name} for path in sorted(folder.iterdir())]
                self.send(json.dumps({"id": REPOSITORY, "sha": COMMIT, "siblings": siblings}).encode())
            elif self.path.startswith(f"/{REPOSITORY}/resolve/") and (folder / self.path.split("/")[-1]).is_file():
                self.send((folder / self.path.split("/")[-1]).read_bytes())
            else:
                self.send(b"", 404)

        do_GET = do_HEAD = answer

        def fail(self) -> None:
            if stub.fault == "hangs":
                stub.ended.wait()
            if stub.fault.isdigit():
                self.send(b"", int(stub.fault))
            else:
                self.close_connection = True
                self.connection.close()

        def send(self, content: bytes, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

    stub = Stub("", fault, faulty)
    with serving(Hub, stub.ended.set) as stub.address:
        yield stub


if __name__ == "__main__":
    with hub_of(Path(sys.argv[1]), sys.argv[2]) as served:
        print(served.address, flush=True)
        sys.stdin.read()
