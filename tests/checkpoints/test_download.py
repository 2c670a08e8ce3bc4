"""Files behind a URL: fetched once, resumed, never taken incomplete. The server is one of this process."""

import hashlib
import http.server
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lavish.checkpoints import download
from lavish.checkpoints.download import cache_folder, fetch, is_url
from lavish.common.errors import CheckpointError, ConfigError, DataError

CONTENT = bytes(range(256)) * 40


OK, PART = b"HTTP/1.0 200 OK\r\n", b"HTTP/1.0 206 Partial\r\n"
ODD = {
    "nonsense": b"hello\r\n",
    "length": OK + b"Content-Length: many\r\n\r\nx",
    "chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nff\r\nab",
    "gzip": OK + b"Content-Encoding: gzip\r\n\r\nabc",
    "nothing": b"HTTP/1.0 204 No Content\r\n\r\n",
    "elsewhere": b"HTTP/1.0 302 Found\r\nLocation: http://example.org/x.json\r\n\r\n",
    "ftp": b"HTTP/1.0 302 Found\r\nLocation: ftp://example.org/x.json\r\n\r\n",
    "bracket": b"HTTP/1.0 302 Found\r\nLocation: https://[x/x.json\r\n\r\n",
    "other": PART + b"Content-Range: bytes 7-8/9\r\n\r\nab",
    "all": PART + b"Content-Range: bytes 0-2/3\r\nContent-Length: 3\r\n\r\nabc",
}
"""Answers by the name that is asked for."""


class Server(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT, from where a Range asks; `broken` answers stop half way, `/whole` knows no ranges."""

    asked: list[str | None] = []
    broken = 0

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        type(self).asked.append(wanted)
        if "absent" in self.path:
            self.send_error(404)
            return
        if (name := self.path.rpartition("/")[2].partition(".")[0]) in ODD:
            self.close_connection = True
            self.wfile.write(ODD[name])
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and "whole" not in self.path else 0
        if start >= len(CONTENT):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(CONTENT)}")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        body = CONTENT[start:]
        if type(self).broken:
            type(self).broken -= 1
            body = body[: len(body) // 2]
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("LAVISH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("LAVISH_OFFLINE", raising=False)
    Server.asked, Server.broken = [], 0
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_a_file_is_fetched_once(server: str) -> None:
    file = fetch(f"{server}/models/x.pth")
    assert (file.name, file.read_bytes()) == ("x.pth", CONTENT)
    assert file.is_relative_to(cache_folder())
    assert fetch(f"{server}/models/x.pth") == file
    assert Server.asked == [None]
    assert fetch(f"{server}/others/x.pth") != file, "another URL is another file"


def test_what_broke_off_goes_on(server: str) -> None:
    Server.broken = 2
    for _ in range(2):
        with pytest.raises(CheckpointError, match="Run again: it resumes"):
            fetch(f"{server}/x.pth")
    file = fetch(f"{server}/x.pth")
    assert file.read_bytes() == CONTENT
    half = len(CONTENT) // 2
    assert Server.asked == [None, f"bytes={half}-", f"bytes={half + half // 2}-"]
    assert [path.name for path in file.parent.iterdir()] == ["x.pth"]


def test_a_server_without_ranges_starts_again(server: str) -> None:
    Server.broken = 1
    with pytest.raises(CheckpointError):
        fetch(f"{server}/whole.pth")
    assert fetch(f"{server}/whole.pth").read_bytes() == CONTENT


def test_a_part_that_is_all_there(server: str) -> None:
    file = fetch(f"{server}/x.pth")
    file.rename(file.with_name("x.pth.part"))
    assert fetch(f"{server}/x.pth").read_bytes() == CONTENT


def test_a_part_that_is_no_beginning(server: str, tmp_path: Path) -> None:
    """Longer than the file, which is another one since: it starts anew and is not taken for the whole."""
    (tmp_path / "x.json.part").write_bytes(CONTENT + b"more")
    assert fetch(f"{server}/x.json", tmp_path / "x.json").read_bytes() == CONTENT
    (tmp_path / "all.json.part").write_bytes(b"xx")
    assert fetch(f"{server}/all.json", tmp_path / "all.json").read_bytes() == b"abc", "it sends all, and says so"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nonsense", "hello"),
        ("length", "invalid literal"),
        ("chunks", "IncompleteRead"),
        ("gzip", "the server sends it compressed"),
        ("nothing", "the status 204 and no file"),
        ("elsewhere", r"it redirects to http://example\.org/x\.json: only https is fetched"),
        ("ftp", r"it redirects to ftp://example\.org/x\.json: only https is fetched"),
        ("bracket", "Invalid IPv6 URL"),
        ("other", "from byte 7 on, and byte 2 was asked for"),
    ],
)
def test_odd_answers(name: str, message: str, server: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}.json.part").write_bytes(b"xx")
    with pytest.raises(DataError, match=rf"{name}\.json: could not be fetched \(.*{message}.*\)\. Run again"):
        fetch(f"{server}/{name}.json", tmp_path / f"{name}.json", error=DataError)
    assert not (tmp_path / f"{name}.json").exists()


def test_a_name_with_spaces(server: str) -> None:
    assert fetch(f"{server}/ü x.json").name == "ü x.json"


def test_what_is_not_there(server: str) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.pth: could not be fetched \(Not Found\)"):
        fetch(f"{server}/absent.pth")


def test_offline(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = fetch(f"{server}/x.pth")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch(f"{server}/x.pth") == file
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
        fetch(f"{server}/y.pth")


def test_a_place_of_ones_own(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "data" / "rows.json"
    assert fetch(f"{server}/x.json", place) == place
    assert place.read_bytes() == CONTENT
    monkeypatch.setenv("LAVISH_OFFLINE", "1")
    with pytest.raises(
        DataError, match=rf"LAVISH_OFFLINE is set and the file is not in .*Put it at {tmp_path}/y\.json"
    ):
        fetch(f"{server}/y.json", tmp_path / "y.json", error=DataError)


def test_md5(server: str, tmp_path: Path) -> None:
    right = hashlib.md5(CONTENT).hexdigest()
    with pytest.raises(DataError, match=f"came with the md5 {right}, not 0000"):
        fetch(f"{server}/x.json", tmp_path / "x.json", md5="0" * 32, error=DataError)
    assert not list(tmp_path.glob("x.json*")), "what is wrong does not stay"
    assert fetch(f"{server}/x.json", tmp_path / "x.json", md5=right.upper()).read_bytes() == CONTENT
    (tmp_path / "x.json").write_text("the user's own")
    assert fetch(f"{server}/x.json", tmp_path / "x.json", md5=right).read_text() == "the user's own"


def test_several_at_once_fetch_once(server: str, tmp_path: Path) -> None:
    """Processes of one run ask for the same file; here they are threads, which locks keep apart alike."""
    with ThreadPoolExecutor(8) as pool:
        files = list(pool.map(lambda _: fetch(f"{server}/x.json", tmp_path / "x.json"), range(8)))
    assert {file.read_bytes() for file in files} == {CONTENT}
    assert Server.asked == [None]
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["x.json"]


def test_a_bar_on_a_terminal_only(server: str, capfd: pytest.CaptureFixture[str]) -> None:
    fetch(f"{server}/x.pth")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://example.org/x.pth", "only https"),
        ("https://example.org/", "names no file"),
        ("https://[x/y.pth", "is no URL"),
        ("https://example.org:port/y.pth", "is no URL"),
        ("ftp://localhost/y.pth", "only https"),
    ],
)
def test_refused(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fetch(url)


def test_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAVISH_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert download.cache_folder() == Path("/somewhere/lavish")
    assert is_url("https://x/y.pth")
    assert not is_url("models/y.pth")
    assert not is_url(Path("x"))
