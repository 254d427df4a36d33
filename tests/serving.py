"""A server in a process of its own, and an application that is asked without a socket."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
URL = "http://127.0.0.1"


def environment():
    """Returns an environment for one device, compiled quickly, whose programs are kept for the next test."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "ignore"}
    env.pop("XLA_FLAGS", None)
    return env


class Served:
    """`sdjax ui` on a free port; killed and started again it has the same folder, and a port of its own."""

    def __init__(self, out, *arguments, model="random:tiny", page=False):
        more = [] if page else ["--api-only"]  # Gradio takes seconds to start
        self.out, self.arguments, self.process = Path(out), ["--model", model, *more, *map(str, arguments)], None
        self.log = self.out.with_name(f"{self.out.name}.log")

    def start(self):
        line = [sys.executable, "-m", "sdjax", "ui", "--out", str(self.out), "--port", "0", *self.arguments]
        begin = time.monotonic()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(line, env=environment(), stdout=log, stderr=log, cwd=ROOT)
        while "; API" not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() - begin < 180, self.log.read_text()
            time.sleep(0.02)
        self.url = self.log.read_text().split("sdjax: ")[1].split(" ")[0]
        return self

    def client(self):
        from sdjax.client import Client

        return Client(self.url)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def worker(self):
        """Returns the number of the process that has the device."""
        try:
            return int((self.out / "device.lock").read_text())
        except (OSError, ValueError):
            return None

    def kill_worker(self):
        pid = self.worker()
        try:
            os.kill(pid, signal.SIGKILL)
        except (TypeError, ProcessLookupError):
            return False
        return True

    def stop(self):
        """Ends the server as Ctrl-C does; returns its exit status."""
        self.process.send_signal(signal.SIGINT)
        status = self.process.wait(60)
        pid = self.worker()
        assert not pid or not Path(f"/proc/{pid}").exists() or gone(pid), "a worker is left"
        return status


def gone(pid, seconds=10):
    """Returns whether a process ends within some seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def wait_for(condition, seconds=60):
    """Returns the first true value of condition(); fails after some seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError("it did not come")


class Answer:
    """What an application answered."""

    def __init__(self, status, headers, body):
        self.status, self.headers, self.body = status, headers, body

    def json(self):
        return json.loads(self.body)

    def __repr__(self):
        return f"{self.status} {self.body[:300]!r}"


def ask(app, method, path, body=b"", headers=(), client="127.0.0.1", host="127.0.0.1:7860"):
    """Returns the Answer of an ASGI application; body: bytes, or what becomes JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    path, _, query = path.partition("?")
    sent = {"host": host, "content-length": str(len(data)), "content-type": "application/json", **dict(headers)}
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
        "path": path, "raw_path": path.encode(), "query_string": query.encode(), "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in sent.items() if value is not None],
        "client": (client, 1), "server": ("127.0.0.1", 7860), "state": {},
    }  # fmt: skip
    parts, begun, given = [], {}, [{"type": "http.request", "body": data, "more_body": False}]

    async def receive():
        if given:
            return given.pop(0)
        await asyncio.sleep(3600)

    async def send(message):
        if message["type"] == "http.response.start":
            begun.update(message)
        else:
            parts.append(message.get("body", b""))

    asyncio.run(app(scope, receive, send))
    there = {name.decode().lower(): value.decode() for name, value in begun["headers"]}
    return Answer(begun["status"], there, b"".join(parts))


def form(*files, **fields):
    """Returns (body, headers) of a form with files, (field, name, bytes), and fields."""
    mark, parts = "0123456789abcdef", []
    for field, name, data in files:
        head = f'--{mark}\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n\r\n'
        parts += [head.encode(), data, b"\r\n"]
    for field, value in fields.items():
        parts.append(f'--{mark}\r\nContent-Disposition: form-data; name="{field}"\r\n\r\n{value}\r\n'.encode())
    return b"".join([*parts, f"--{mark}--\r\n".encode()]), {"content-type": f"multipart/form-data; boundary={mark}"}
