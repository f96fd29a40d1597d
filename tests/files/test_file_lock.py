"""Several processes on one folder: every writer has a temporary of its own, and one at a time makes what is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from pipeline.files.atomic import OLD_S, replacing, sweep_temporaries, temporary_of
from pipeline.files.lock import FileLock, lock_of, waiting_for
from tests.processes import PROJECT

WRITER = """
import sys
from pathlib import Path
from pipeline.files.atomic import replacing
path, mark = Path(sys.argv[1]), sys.argv[2].encode()
for turn in range(300):
    with replacing(path) as temporary:
        temporary.write_bytes(mark * (1000 + turn))
    content = path.read_bytes()
    assert len(content) >= 1000 and content == content[:1] * len(content), (turn, len(content), set(content))
"""
WAITER = """
import sys
from pathlib import Path
from pipeline.files.lock import waiting_for
with waiting_for(Path(sys.argv[1]), "a test"):
    print(Path(sys.argv[2]).exists(), flush=True)
"""


def python(script: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_that_replace_one_file_both_end_well_and_leave_it_whole(tmp_path: Path) -> None:
    path = tmp_path / "features.bin"
    writers = [python(WRITER, path, mark) for mark in "ab"]
    errors = [writer.communicate(timeout=120)[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0], errors
    assert set(path.read_text()) in ({"a"}, {"b"}) and list(tmp_path.iterdir()) == [path]


def test_what_dead_processes_left_is_swept_and_what_lives_is_not(tmp_path: Path) -> None:
    dead = python("pass")
    dead.communicate(timeout=60)
    own = temporary_of(tmp_path / "a.tar")
    names = {
        "dead": own.name.replace(f".{os.getpid()}.", f".{dead.pid}."),
        "ours": own.name,
        "elsewhere": "a.tar.othernode.1.0.tmp",
        "elsewhere, old": "b.tar.othernode.1.0.tmp",
        "of an earlier version, old": "c.tar.tmp",
    }
    for name in names.values():
        (tmp_path / name).write_bytes(b"half")
    for name in ("elsewhere, old", "of an earlier version, old"):
        stat = (tmp_path / names[name]).stat()
        os.utime(tmp_path / names[name], (stat.st_atime, stat.st_mtime - OLD_S - 1))
    sweep_temporaries(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {names["ours"], names["elsewhere"]}


def test_two_threads_of_a_process_have_different_temporaries(tmp_path: Path) -> None:
    with replacing(tmp_path / "a") as one, replacing(tmp_path / "a") as other:
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "a").read_text() == "one"


def test_who_waits_goes_on_when_the_holder_has_released(tmp_path: Path) -> None:
    path, made = lock_of(tmp_path / "train"), tmp_path / "made"
    lock = FileLock(path)
    assert lock.acquire()
    assert f"process {os.getpid()} on " in FileLockOfAnother(path).holder_seen()
    waiter = python(WAITER, path, made)
    assert waiter.poll() is None
    made.touch()
    lock.release()
    assert waiter.communicate(timeout=60)[0].strip() == "True"


def test_the_lock_of_a_process_that_ended_is_gone(tmp_path: Path) -> None:
    done = python(
        "import sys; from pathlib import Path; from pipeline.files.lock import FileLock; "
        "FileLock(Path(sys.argv[1])).acquire()",
        tmp_path / "x.lock",
    )
    done.communicate(timeout=60)
    with waiting_for(tmp_path / "x.lock", "a test"):
        pass


class FileLockOfAnother:
    """Looks at a lock from another process: closing its file here would release it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def holder_seen(self) -> str:
        script = "import sys; from pathlib import Path; from pipeline.files.lock import FileLock\n"
        script += "lock = FileLock(Path(sys.argv[1])); print(lock.acquire(), lock.holder())"
        said = python(script, self.path).communicate(timeout=60)[0]
        assert said.startswith("False")
        return said
