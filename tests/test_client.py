"""The client alone, against a server that breaks off, goes away and lies."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import pytest

from sdjax import client
from sdjax.client import Client, ServerError

EXPORT = ["unet/config.json", "vae/config.json", "été #1?.safetensors"]


class Handler(BaseHTTPRequestHandler):
    """Answers from server.answers {path: a list of bodies, taken one by one, the last stays}; None breaks off."""

    def do_GET(self):
        self.server.asked.append(self.path)
        given = self.server.answers[unquote(self.path.partition("?")[0])]
        body = given.pop(0) if len(given) > 1 else given[0]
        if body is not None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def served():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked, server.answers = [], {}
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server, Client(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()


def event(job):
    return f"event: job\ndata: {json.dumps(job)}\n\n".encode()


def test_watching_goes_on_when_the_server_is_back(served, monkeypatch):
    server, asks = served
    slept, first = [], {"id": 1, "changed": 4, "state": "running"}
    monkeypatch.setattr(client.time, "sleep", slept.append)
    last = first | {"changed": 6, "state": "done"}
    server.answers = {
        "/api/jobs/1": [json.dumps(first).encode(), None],
        "/api/events": [None, None, b"", event(last)[:-9], event(last | {"id": 2}), event(last)],
    }
    assert list(asks.watch(1)) == [first, last]
    assert slept == [client.AGAIN] * 5 and server.asked[1:] == ["/api/events?after=4"] * 6


def test_an_export_keeps_its_folders(served, tmp_path):
    server, asks = served
    server.answers = {f"/api/jobs/1/export/{name}": [name.encode()] for name in EXPORT}
    server.answers["/api/jobs/1"] = [json.dumps({"result": {"export": EXPORT}}).encode()]
    assert asks.export(1, tmp_path) == [tmp_path / name for name in EXPORT]
    assert [(tmp_path / name).read_bytes().decode() for name in EXPORT] == EXPORT


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/x", "C:x", "..\\x", "\\x", ""])
def test_an_export_stays_in_its_folder(served, tmp_path, name):
    server, asks = served
    server.answers = {"/api/jobs/1": [json.dumps({"result": {"export": ["a", name]}}).encode()]}
    with pytest.raises(ServerError, match="expected a path below"):
        asks.export(1, tmp_path / "out")
    assert not list(tmp_path.iterdir())
