"""Downloads go on where they were ended, are verified, and are not taken for whole before they are."""

from __future__ import annotations

import hashlib
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from data_prep.__main__ import app
from data_prep.download import fetch as fetching
from data_prep.download import manifest, run
from data_prep.download.fetch import Fetched, Patience, Wanted, fetch
from data_prep.download.manifest import Benchmark, benchmark_named, benchmarks
from data_prep.download.record import RECORD
from data_prep.download.run import Downloads
from data_prep.sources import addresses
from pipeline.errors import EXIT_OK, EXIT_RESUMABLE, EXIT_USER, Interrupted, UserError, UserErrors
from tests.data_prep.file_server import Files, files

CONTENT = bytes(range(256)) * 40
HASH = hashlib.sha256(CONTENT).hexdigest()
SOON = Patience(timeout_s=5.0, tries=2, pause_s=0.01)


@pytest.fixture
def server() -> Iterator[Files]:
    with files() as served:
        served.content["/a.bin"] = CONTENT
        yield served


def get(server: Files, folder: Path, path: str = "/a.bin", patience: Patience = SOON, **known: Any) -> Fetched:
    wanted = Wanted(server.address + path, folder / "a.bin", known_from="as the test says", **known)
    return fetch(wanted, lambda there, whole: None, patience)


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------------------------------------- one file


def test_a_file_is_fetched_whole_and_nothing_else_is_left(server: Files, tmp_path: Path) -> None:
    assert get(server, tmp_path, sha256=HASH, size=len(CONTENT)) == Fetched(len(CONTENT), HASH)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT and left(tmp_path) == ["a.bin"]


def test_a_connection_that_breaks_goes_on_where_it_broke(server: Files, tmp_path: Path) -> None:
    server.breaks["/a.bin"] = [1000, 2000, 50]
    assert get(server, tmp_path).sha256 == HASH
    assert [asked for _, _, asked in server.asked] == ["", "bytes=1000-", "bytes=3000-", "bytes=3050-"]


def test_another_call_goes_on_where_the_first_was_ended(server: Files, tmp_path: Path) -> None:
    server.breaks["/a.bin"] = [5000]
    server.status["/gone"] = 503
    with pytest.raises(Interrupted, match=r"5000 of 10240 bytes arrived.*The same command goes on"):
        get(server, tmp_path, patience=Patience(5.0, 0, 0.0))
    assert left(tmp_path) == ["a.bin.part", "a.bin.part.json"]
    assert get(server, tmp_path).sha256 == HASH
    assert server.asked[-1][2] == "bytes=5000-" and left(tmp_path) == ["a.bin"]


def test_a_file_that_has_changed_is_begun_anew(server: Files, tmp_path: Path) -> None:
    server.breaks["/a.bin"] = [5000]
    with pytest.raises(Interrupted):
        get(server, tmp_path, patience=Patience(5.0, 0, 0.0))
    server.content["/a.bin"] = b"other" * 3000
    get(server, tmp_path)
    assert (tmp_path / "a.bin").read_bytes() == b"other" * 3000


def test_a_server_without_ranges_and_one_without_sizes_are_read_anew(server: Files, tmp_path: Path) -> None:
    server.breaks["/a.bin"] = [5000]
    server.no_ranges = True
    assert get(server, tmp_path).sha256 == HASH
    server.no_sizes = True
    assert get(server, tmp_path / "other").sha256 == HASH


def test_a_part_that_is_whole_already_is_not_fetched_again(server: Files, tmp_path: Path) -> None:
    server.breaks["/a.bin"] = [10]
    with pytest.raises(Interrupted):
        get(server, tmp_path, patience=Patience(5.0, 0, 0.0))
    (tmp_path / "a.bin.part").write_bytes(CONTENT)  # the process was killed before it renamed it
    assert get(server, tmp_path).sha256 == HASH
    assert server.asked[-1][2] == f"bytes={len(CONTENT)}-"


def test_content_of_another_hash_or_size_is_removed(server: Files, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"has the sha256 {HASH}, expected 0000.* \(as the test says\)"):
        get(server, tmp_path, sha256="0" * 64)
    assert left(tmp_path) == []
    with pytest.raises(UserError, match=r"has 10240 bytes, expected 7"):
        get(server, tmp_path, size=7)
    server.no_sizes = True
    with pytest.raises(UserError, match=r"has the size 10240, expected 7"):
        get(server, tmp_path, size=7)
    assert not (tmp_path / "a.bin").exists()


@pytest.mark.parametrize("status", [403, 404, 410])
def test_a_refusal_is_a_sentence(server: Files, tmp_path: Path, status: int) -> None:
    server.status["/a.bin"] = status
    with pytest.raises(UserError, match=rf"/a\.bin answered {status} .*Look at the owner's page"):
        get(server, tmp_path)
    assert left(tmp_path) == []


def test_a_server_that_is_busy_is_asked_again(server: Files, tmp_path: Path) -> None:
    server.status["/a.bin"] = 503
    with pytest.raises(Interrupted, match=r"answered 503.*The same command goes on"):
        get(server, tmp_path)
    assert len(server.asked) == 2


def test_a_server_that_sends_nothing_is_not_waited_for(server: Files, tmp_path: Path) -> None:
    server.slow_s["/a.bin"] = 30.0
    with pytest.raises(Interrupted, match=r"could not be fetched \(.*timed out"):
        get(server, tmp_path, patience=Patience(0.2, 1, 0.0))


def test_no_server_is_an_interruption(tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="could not be fetched"):
        fetch(Wanted("http://127.0.0.1:9/a", tmp_path / "a"), lambda there, whole: None, Patience(1.0, 1, 0.0))
    assert Interrupted.exit_code == EXIT_RESUMABLE


def test_redirections_are_followed(server: Files, tmp_path: Path) -> None:
    server.moved["/old.bin"] = f"{server.address}/a.bin"
    assert get(server, tmp_path, "/old.bin").sha256 == HASH
    server.moved["/loop"] = f"{server.address}/loop"
    with pytest.raises(UserError, match=r"answered 302"):
        get(server, tmp_path / "loop", "/loop")


def test_a_redirection_to_an_unencrypted_address_is_refused() -> None:
    request = fetching.urllib.request.Request("https://a.org/x")
    with pytest.raises(UserError, match="leads to http, which is not encrypted"):
        fetching._NoDowngrade().redirect_request(request, None, 302, "", {}, "http://b.org/x")


def test_the_proxy_of_the_environment_is_used(server: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.address)
    monkeypatch.setenv("no_proxy", "")
    server.content["http://elsewhere.invalid/a.bin"] = b"by the proxy"
    fetch(Wanted("http://elsewhere.invalid/a.bin", tmp_path / "a"), lambda there, whole: None, SOON)
    assert (tmp_path / "a").read_bytes() == b"by the proxy"


def test_two_processes_do_not_fetch_one_file(server: Files, tmp_path: Path) -> None:
    import fcntl

    with (tmp_path / "a.bin.part").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is fetching"):
            get(server, tmp_path)


# ---------------------------------------------------------------------------------------------- a benchmark


def archive(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as zipped:
        for name, content in members.items():
            zipped.writestr(name, content)
    return stream.getvalue()


def hub(server: Files, contents: dict[str, bytes], folder: str = "Instr") -> None:
    """Have the repository owner/set with files, the first of them in LFS; its listing comes in two pages."""
    server.json("/api/datasets/owner/set", {"sha": "c" * 40})
    entries = []
    for number, (path, content) in enumerate(contents.items()):
        server.content[f"/datasets/owner/set/resolve/{'c' * 40}/{path}"] = content
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content)}
        if number == 0:
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content)}
        entries.append(entry)
    server.json(f"/api/datasets/owner/set/tree/{'c' * 40}/{folder}?recursive=true", entries)


@pytest.fixture
def benchmark(server: Files, monkeypatch: pytest.MonkeyPatch) -> Benchmark:
    """Two tasks with an archive each, and one by hand."""
    for name in ("one", "two"):
        server.content[f"/{name}.zip"] = archive({f"images/{name}.png": name.encode(), f"images/{name}2.png": b"x"})
    server.content["/answers.json"] = b"{}"
    hub(server, {"Instr/One/train.json": b"[1]", "Instr/One/test.json": b"[2]", "Instr/Two/train.json": b"[3]"})
    fields = {
        "title": "Bench",
        "instructions": {"repository": "owner/set", "folder": "Instr", "into": "instructions"},
        "files": {
            "one": {"url": f"{server.address}/one.zip", "unpack": "datasets/One", "terms": "https://one.org"},
            "answers": {"url": f"{server.address}/answers.json", "into": "instructions/One", "licence": "CC0"},
            "two": {"url": f"{server.address}/two.zip", "unpack": "datasets/Two"},
        },
        "tasks": {
            "One": {"files": ["one", "answers"]},
            "Two": {"files": ["two"]},
            "Hand": {"hand": {"url": "https://hand.org", "into": "datasets/Hand", "why": "it needs an account"}},
        },
    }
    found = Benchmark.model_validate(fields)
    monkeypatch.setattr(manifest, "benchmarks", lambda: {"bench": found})
    return found


def downloads(server: Files, benchmark: Benchmark, root: Path, *tasks: str, said: list[str] | None = None) -> Downloads:
    lines: list[str] = [] if said is None else said
    return Downloads(benchmark, benchmark.chosen(tasks), root, server.address, SOON, lines.append)


def tree(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


ONE = {
    "archives/One-one.zip", "datasets/One/images/one.png", "datasets/One/images/one2.png", RECORD,
    "instructions/One/answers.json", "instructions/One/test.json", "instructions/One/train.json",
}  # fmt: skip


def test_a_tasks_files_come_to_their_places(server: Files, benchmark: Benchmark, tmp_path: Path) -> None:
    said: list[str] = []
    done = downloads(server, benchmark, tmp_path, "one", said=said).run()
    assert tree(tmp_path) == ONE
    assert (done["fetched"], done["there"], done["by_hand"]) == (4, 0, [])
    assert len([line for line in said if "no hash of it is published" in line]) == 3  # the listing has that of one
    kept = json.loads((tmp_path / RECORD).read_text())
    assert kept[f"{server.address}/one.zip"]["unpacked"] == 2


def test_what_is_there_is_not_fetched_again(server: Files, benchmark: Benchmark, tmp_path: Path) -> None:
    downloads(server, benchmark, tmp_path, "One").run()
    (tmp_path / "archives" / "One-one.zip").unlink()  # not needed any more
    server.asked.clear()
    done = downloads(server, benchmark, tmp_path, "One").run()
    assert (done["fetched"], done["there"]) == (0, 4)
    assert all("/api/" in path for _, path, _ in server.asked)


def test_another_content_than_the_first_time_is_refused(server: Files, benchmark: Benchmark, tmp_path: Path) -> None:
    downloads(server, benchmark, tmp_path, "One").run()
    (tmp_path / "instructions" / "One" / "answers.json").unlink()
    server.content["/answers.json"] = b"[]"
    with pytest.raises(UserErrors, match=r"answers\.json has the sha256 \w+, expected \w+ \(as .*downloads\.json"):
        downloads(server, benchmark, tmp_path, "One").run()
    assert not (tmp_path / "instructions" / "One" / "answers.json").exists()


def test_a_file_that_was_put_there_by_hand_is_taken(server: Files, benchmark: Benchmark, tmp_path: Path) -> None:
    (tmp_path / "archives").mkdir()
    (tmp_path / "archives" / "One-one.zip").write_bytes(server.content["/one.zip"])
    downloads(server, benchmark, tmp_path, "One").run()
    assert not [path for method, path, _ in server.asked if method == "GET" and path == "/one.zip"]
    (tmp_path / "instructions" / "One" / "train.json").write_bytes(b"damaged")
    (tmp_path / RECORD).unlink()
    with pytest.raises(UserErrors, match=r"is there as .*train\.json with the sha256 .*Remove that file"):
        downloads(server, benchmark, tmp_path, "One").run()


def test_one_file_that_is_refused_does_not_keep_back_the_others(
    server: Files, benchmark: Benchmark, tmp_path: Path
) -> None:
    server.status["/one.zip"] = 404
    with pytest.raises(UserErrors) as raised:
        downloads(server, benchmark, tmp_path, "One", "Two").run()
    assert len(raised.value.sentences) == 1 and "/one.zip answered 404" in raised.value.sentences[0]
    assert {"datasets/Two/images/two.png", "instructions/One/answers.json"} <= tree(tmp_path)


def test_a_disk_that_is_too_small_is_told_before_anything_is_fetched(
    server: Files, benchmark: Benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "free_space", lambda path: run.RESERVE)
    with pytest.raises(UserError, match=r"The files take .* are free; expected 1\.1 GB more"):
        downloads(server, benchmark, tmp_path, "One").run()
    assert tree(tmp_path) == set()


def test_what_is_to_come_is_told_before_anything_is_fetched(
    server: Files, benchmark: Benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.content["/one.zip"] = archive({"images/one.png": bytes(3_000_000), "images/one2.png": b"x"})
    monkeypatch.setattr(run, "free_space", lambda path: 5 * run.RESERVE)
    said: list[str] = []

    class Told(Downloads):
        def _fetch(self, *arguments: Any) -> None:
            said.append("fetched")

    fetcher = Told(benchmark, ["One"], tmp_path, server.address, SOON, said.append)
    fetcher.run()
    taken = f"they take about 6.0 MB below {tmp_path} with what is unpacked, and 5.4 GB are free."
    assert said[:2] == [f"{server.address}/one.zip: 3.0 MB", f"To fetch: 4 files, 3.0 MB; {taken}"]
    assert said[2:] == ["fetched"] * 4
    (tmp_path / "archives").mkdir()
    (tmp_path / "archives" / "One-one.zip.part").write_bytes(bytes(2_000_000))
    said.clear()
    fetcher.run()
    assert "To fetch: 4 files, 1.0 MB; they take about 4.0 MB" in said[1], "what is there already is not fetched again"
    server.no_sizes = True
    said.clear()
    fetcher.run()
    assert said[0] == f"{server.address}/one.zip: its server does not tell its size; whether it fits is not known."
    assert "beside 2 files of unknown size" in said[2], "the Hub lists the sizes of the others"


@pytest.mark.parametrize("name", ["../out.png", "/out.png"])
def test_an_archive_with_paths_outside_is_not_unpacked(
    server: Files, benchmark: Benchmark, tmp_path: Path, name: str
) -> None:
    server.content["/one.zip"] = archive({name: b"x"})
    with pytest.raises(UserErrors, match="a link or a path outside"):
        downloads(server, benchmark, tmp_path / "root", "One").run()
    assert not (tmp_path / "out.png").exists() and not (tmp_path / "root" / "datasets").exists()


def test_a_page_in_place_of_an_archive_is_no_archive(server: Files, benchmark: Benchmark, tmp_path: Path) -> None:
    server.content["/one.zip"] = b"<html>log in</html>"
    with pytest.raises(UserErrors, match=r"One-one\.zip is no zip archive"):
        downloads(server, benchmark, tmp_path, "One").run()


def test_a_damaged_member_is_not_left_half(server: Files, benchmark: Benchmark, tmp_path: Path) -> None:
    whole = archive({"images/a.png": b"first" * 10, "images/b.png": b"second" * 10})
    server.content["/one.zip"] = whole.replace(b"second", b"sekond", 1)
    with pytest.raises(UserErrors, match=r"is damaged at 'images/b\.png'"):
        downloads(server, benchmark, tmp_path, "One").run()
    assert {path for path in tree(tmp_path) if path.startswith("datasets")} == {"datasets/One/images/a.png"}


def test_a_task_that_a_repository_does_not_have_is_named(server: Files, benchmark: Benchmark, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no file of Hand; it has One, Two"):
        downloads(server, benchmark, tmp_path, "Hand").run()


def test_a_path_outside_that_a_repository_names_is_refused(server: Files, benchmark: Benchmark, tmp_path: Path) -> None:
    hub(server, {"Instr/One/../../../out.json": b"[]"})
    with pytest.raises(UserError, match="which is outside its folder"):
        downloads(server, benchmark, tmp_path, "One").run()


def test_a_damaged_record_is_a_sentence(server: Files, benchmark: Benchmark, tmp_path: Path) -> None:
    for content in ("{", "[]", '{"a": {"path": 1}}'):
        (tmp_path / RECORD).write_text(content)
        with pytest.raises(UserError, match="cannot be read"):
            downloads(server, benchmark, tmp_path, "One").run()


# ---------------------------------------------------------------------------------------------- the verb


def test_the_verb_fetches_and_names_what_is_by_hand(server: Files, benchmark: Benchmark, tmp_path: Path) -> None:
    hub(server, {"Instr/Two/train.json": b"[3]", "Instr/Hand/train.json": b"[4]"})
    arguments = ["download", "bench", "--tasks", "two,hand", "--root", str(tmp_path), "--endpoint", server.address]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == EXIT_OK, done.output
    assert f"Hand: fetch its images by hand from https://hand.org into {tmp_path}/datasets/Hand" in done.stdout
    assert "fetched 3 files, 0 were there" in done.stdout


def test_the_list_tells_sizes_and_fetches_nothing(server: Files, benchmark: Benchmark, tmp_path: Path) -> None:
    server.status["/two.zip"] = 404
    hub(server, {"Instr/One/train.json": b"[1]" * 500, "Instr/Two/train.json": b"[3]"})
    arguments = ["download", "bench", "--tasks", "One,Two", "--root", str(tmp_path), "--endpoint", server.address]
    done = CliRunner().invoke(app, [*arguments, "--list"])
    assert done.exit_code == EXIT_OK, done.output
    lines = done.stdout.splitlines()
    assert lines[0] == f"{server.address}/datasets/owner/set: the instructions of One, Two: 2 files, 1.5 kB"
    size = run.in_words(len(server.content["/one.zip"]))
    assert lines[1].startswith(f"{server.address}/one.zip into datasets/One: {size}, no hash published")
    assert "two.zip into datasets/Two: size unknown" in lines[3] and "answered 404" in lines[3]
    assert re.match(r"To fetch: 5 files, 1\.\d kB, beside 1 file of unknown size; .* and .* are free\.", lines[4])
    asked = {method for method, path, _ in server.asked if "/api/" not in path}
    assert tree(tmp_path) == set() and asked == {"HEAD"}


def test_the_list_of_a_real_benchmark_needs_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    def unreachable(url: str, *_: Any, **__: Any) -> None:
        asked.append(url)
        raise fetching.urllib.error.URLError("no route")

    monkeypatch.setattr(fetching, "opened", unreachable)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["download", "coin", "--tasks", "ScienceQA,TextVQA", "--list"])
    assert done.exit_code == EXIT_OK, done.output
    assert "huggingface.co/datasets/Zacks-Chen/CoIN: the instructions of ScienceQA, TextVQA: size un" in done.stdout
    assert len(asked) == 1, "a server that cannot be reached is not waited for again"
    assert "size unknown, no hash published, licence: see https://textvqa.org/" in done.stdout
    assert "ScienceQA: fetch its images by hand" in done.stdout and tree(tmp_path) == set()
    assert re.search(r"^To fetch: 2 files of unknown size below data/CoIN; .* are free\.$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["coins"], "unknown benchmark 'coins'; expected coin or ucit. Did you mean 'coin'?"),
        (["coin", "--tasks", "TextVQAA"], "CoIN has no task 'TextVQAA'"),
        (["coin", "--endpoint", "hf-mirror"], "--endpoint is 'hf-mirror'; expected an address such as https://"),
    ],
)
def test_an_unknown_name_is_refused(arguments: list[str], sentence: str) -> None:
    done = CliRunner().invoke(app, ["download", *arguments])
    assert done.exit_code == EXIT_USER and sentence in " ".join(done.stderr.split())


# ---------------------------------------------------------------------------------------------- the manifest


@pytest.mark.parametrize("name", ["coin", "ucit"])
def test_the_manifest_has_the_addresses_that_check_names(name: str) -> None:
    known, found = {"coin": addresses.COIN, "ucit": addresses.UCIT}[name], benchmark_named(name)
    assert set(found.tasks) == set(known.images) and found.instructions.repository == known.repository
    for task, sentence in known.images.items():
        hand = found.tasks[task].hand
        urls = {file.url for file in found.files_of([task])} | ({hand.url} if hand else set())
        said = {url.rstrip("/") for url in re.findall(r"https?://[^\s;),]+", sentence)}
        assert not said - {url.rstrip("/") for url in urls} - {f"https://huggingface.co/datasets/{known.repository}"}


def test_what_is_not_known_is_not_made_up() -> None:
    for found in benchmarks().values():
        for file in found.files.values():
            assert file.size is None and file.sha256 is None and file.licence is None and file.terms
