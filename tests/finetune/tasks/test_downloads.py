"""Against a real server on this machine."""

import json
import socket
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from diablo_theory.errors import ConfigError, DataUnavailableError
from diablo_theory.finetune.tasks import downloads, records
from diablo_theory.finetune.tasks.downloads import download
from diablo_theory.finetune.tasks.records import Source, load

ROWS = [{"question": f"How many hens are {number}?"} for number in range(5000)]
WHOLE = json.dumps(ROWS).encode()
SOURCE = Source("owner/hens", ("question",), {"test": "data/test.json"}, ("hens",), "MIT", host="github")


class Handler(BaseHTTPRequestHandler):
    """Serves a file whole, short of what it announces, elsewhere, silently, or not at all."""

    def do_GET(self):
        self.server.asked[self.path] += 1
        name = self.path.rpartition("/")[2]
        if name in ("missing.json", "silent.json"):
            if name == "silent.json":
                self.server.released.wait(5)
            self.send_error(404)
            return
        if name == "moved.json":
            self.send_response(302)
            self.send_header("Location", "/whole.json")
            self.end_headers()
            return
        body = b"<html>sorry</html>" if name == "page.json" else WHOLE
        self.send_response(200)
        if name != "unannounced.json":
            self.send_header("Content-Length", str(len(body) + (7 if name == "short.json" else 0)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("DIABLO_THEORY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.released = Counter(), threading.Event()
    server.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


def left(tmp_path):
    return [path for path in (tmp_path / "cache" / "downloads").glob("*") if path.suffix != ".lock"]


@pytest.mark.parametrize("name", ["whole.json", "unannounced.json", "moved.json"])
def test_a_file_is_fetched_once(server, tmp_path, name):
    first, again = (download(f"{server.address}/{name}") for _ in range(2))
    assert first == again
    assert first.read_bytes() == WHOLE
    assert server.asked[f"/{name}"] == 1
    assert left(tmp_path) == [first]


def test_files_of_one_name_are_not_mixed_up(server):
    assert download(f"{server.address}/a/whole.json") != download(f"{server.address}/b/whole.json")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("missing.json", "HTTPError: HTTP Error 404: Not Found"),
        ("short.json", f"broke off after {len(WHOLE):,} of {len(WHOLE) + 7:,} bytes"),
        ("silent.json", "timed out"),
    ],
)
def test_what_cannot_be_had_leaves_nothing_and_names_the_way_out(server, tmp_path, monkeypatch, name, said):
    monkeypatch.setattr(records, "GITHUB", server.address)
    monkeypatch.setattr(downloads, "TIMEOUT", 0.2)
    source = Source("owner/hens", ("question",), {"test": name}, ("hens",), "MIT", host="github")
    with pytest.raises(DataUnavailableError) as caught:
        load(source, "test")
    for part in ("owner/hens (GitHub; MIT)", said, "hens/test.json", "data_root=FOLDER"):
        assert part in str(caught.value)
    assert left(tmp_path) == []


def test_no_server_at_all(server, tmp_path, monkeypatch):
    with socket.socket() as taken:  # bound and not listening: every connection is refused
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr(records, "GITHUB", f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(
            DataUnavailableError, match=r"Connection refused.*data_root=FOLDER; fetching needs the net"
        ):
            load(SOURCE, "test")
    assert left(tmp_path) == []


def test_github_files_are_read_like_local_ones(server, monkeypatch):
    monkeypatch.setattr(records, "GITHUB", server.address)
    loaded = load(SOURCE, "test")
    assert loaded == ROWS
    assert loaded[0].file == f"{server.address}/owner/hens/main/data/test.json"
    assert set(server.asked) == {"/owner/hens/main/data/test.json"}


def test_a_notice_in_the_files_place_is_not_kept(server, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "GITHUB", server.address)
    source = Source("owner/hens", ("question",), {"test": "page.json"}, ("hens",), "MIT", host="github")
    with pytest.raises(ConfigError, match=r"owner/hens/main/page\.json, record 1: truncated or damaged"):
        load(source, "test")
    assert left(tmp_path) == []
