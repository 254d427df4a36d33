"""A client of the server (`sdjax ui`): submits jobs, watches them, fetches results.

    from sdjax.client import Client

    client = Client("http://127.0.0.1:7860")                        # user="name", password="..." if required
    job = client.submit("text2img", prompt="a photo of a face", seed=7, count=2)
    for now in client.watch(job["id"]):
        print(now["phase"], now["progress"])
    first, second = client.fetch(job["id"])                          # PNG files, as bytes

Needs only Python's standard library.
"""

import base64
import contextlib
import http.client
import json
import secrets
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path, PureWindowsPath
from typing import Any, BinaryIO
from urllib.parse import quote

AGAIN = 1.0  # seconds before another connection
OVER = ("done", "failed", "cancelled", "stopped")


class ServerError(ValueError):
    """An error message from the server; status: the HTTP status."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Client:
    """A server at an address; timeout: seconds per call."""

    def __init__(self, url: str = "http://127.0.0.1:7860", user: str = "", password: str = "", timeout: float = 60):
        self.url, self.timeout = url.rstrip("/"), timeout
        word = base64.b64encode(f"{user}:{password}".encode()).decode()
        self.headers = {"Authorization": f"Basic {word}"} if user else {}
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    # ---- pictures --------------------------------------------------------------------------------

    def submit(self, task: str = "text2img", count: int = 1, **settings: Any) -> dict[str, Any]:
        """Adds a job of `count` pictures to the queue and returns it.

        settings: settings of the task; pictures by their `upload` names, models by their library names.
        Raises ServerError for an invalid request.
        """
        return self.post("/api/jobs", {"task": task, "settings": settings, "count": count})

    def upload(self, path: str | Path) -> str:
        """Uploads a picture and returns its name for settings: image=client.upload("photo.png")."""
        return json.loads(self._call("/api/uploads", Path(path).read_bytes(), "application/octet-stream"))["name"]

    def job(self, id: int) -> dict[str, Any]:
        """Returns a job: its state, phase, progress from 0 to 1, pictures, error."""
        return self.get(f"/api/jobs/{id}")

    def watch(self, id: int) -> Iterator[dict[str, Any]]:
        """Yields a job after every change until it ends; connects again until a server that went away is back.

        Raises ServerError for an unknown job, OSError if there is no server at the beginning.
        """
        now, last = self.job(id), -1
        while True:
            if now["changed"] > last:
                last = now["changed"]
                yield now
            if now["state"] in OVER:
                return
            now = self._changed(id, last)

    def _changed(self, id: int, last: int) -> dict[str, Any]:
        """Returns a job after its next change, however often the server is away meanwhile."""
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException):
                with self._open(f"/api/events?after={last}") as stream:
                    for found in _events(stream):
                        if found.get("id") == id:
                            return found
            time.sleep(AGAIN)

    def fetch(self, id: int) -> list[bytes]:
        """Returns the PNG files of a job's pictures.  Raises ServerError if the job failed."""
        now = self.job(id)
        if now["state"] == "failed":
            raise ServerError(500, now["error"])
        return [self._call(f"/api/jobs/{id}/pictures/{i}") for i in range(now["pictures"])]

    def stop(self, id: int) -> dict[str, Any]:
        """Stops a running job between two steps, cancels a waiting one."""
        return self.post(f"/api/jobs/{id}/stop")

    # ---- training ----------------------------------------------------------------------------------

    def train(self, recipe: str, pictures: Iterable[str | Path] = (), **order: Any) -> dict[str, Any]:
        """Uploads pictures with captions and adds a training run to the queue.

        order: model, init, settings={"optim.lr": 1e-4}, name, or data for pictures on the server.
        """
        files = [Path(path) for path in pictures]
        if files:
            order["data"] = {"set": self.send_set(files)}
        return self.post("/api/training", {"recipe": recipe, **order})

    def send_set(self, files: Iterable[Path]) -> str:
        """Uploads pictures and captions for training; returns the key of the set."""
        mark = secrets.token_hex(16)
        parts = []
        for path in files:
            head = (
                f'--{mark}\r\nContent-Disposition: form-data; name="files"; filename="{_form_name(path.name)}"\r\n\r\n'
            )
            parts += [head.encode(), path.read_bytes(), b"\r\n"]
        data = b"".join([*parts, f"--{mark}--\r\n".encode()])
        return json.loads(self._call("/api/sets", data, f"multipart/form-data; boundary={mark}"))["set"]

    def export(self, id: int, folder: str | Path) -> list[Path]:
        """Downloads a run's export, with its sub-folders, into a folder and returns the paths.

        Raises ServerError for a name that leads out of the folder.
        """
        names = self.job(id)["result"].get("export", [])
        for name in names:
            told = PureWindowsPath(name)  # reads both kinds of separators
            if told.anchor or ".." in told.parts or not told.parts:
                raise ServerError(500, f"export={name!r}: expected a path below the export's folder")
        paths = [Path(folder, name) for name in names]
        for name, path in zip(names, paths, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self._call(f"/api/jobs/{id}/export/{quote(name)}"))
        return paths

    # ---- calls ---------------------------------------------------------------------------------------

    def get(self, path: str) -> Any:
        """Returns the JSON at an address of the server."""
        return json.loads(self._call(path))

    def post(self, path: str, body: Any = None) -> Any:
        """Sends JSON to an address of the server and returns its JSON."""
        return json.loads(self._call(path, json.dumps(body or {}).encode(), "application/json"))

    def _call(self, path: str, data: bytes | None = None, kind: str = "") -> bytes:
        with self._open(path, data, kind) as answer:
            return answer.read()

    def _open(self, path: str, data: bytes | None = None, kind: str = "") -> BinaryIO:
        headers = {**self.headers, **({"Content-Type": kind} if kind else {})}
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            return self.opener.open(request, timeout=self.timeout)
        except urllib.error.HTTPError as error:
            with error:
                raise ServerError(error.code, _detail(error.read())) from None


def _events(stream: BinaryIO) -> Iterator[dict[str, Any]]:
    """Yields the jobs of a stream of server-sent events."""
    kind = ""
    for line in stream:
        if not line.endswith(b"\n"):
            return  # the connection broke within it
        name, _, value = line.decode().rstrip("\r\n").partition(": ")
        if name == "event":
            kind = value
        elif name == "data" and kind == "job":
            yield json.loads(value)


def _form_name(name: str) -> str:
    """Returns a file's name for a form's header (HTML, multipart/form-data): UTF-8, three characters escaped."""
    return name.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")


def _detail(text: bytes) -> str:
    try:
        return str(json.loads(text)["detail"])
    except (ValueError, KeyError, TypeError):
        return text.decode("utf-8", "replace")[:200]
