"""The server: queue, library and APIs on one address; a worker process computes.

sdjax ui --models models --adapters loras           # http://127.0.0.1:7860

app = create_app(Place(Path("outputs/ui")).made())  # what uvicorn runs
"""

import contextlib
import getpass
import importlib.util
import ipaddress
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse

from sdjax import __version__
from sdjax.formats import pipeline
from sdjax.runtime import accelerator, locks, signals
from sdjax.service import flags, worker
from sdjax.service.library import Library
from sdjax.service.place import Place, private
from sdjax.service.programs import one_line
from sdjax.service.queue import Queue
from sdjax.settings import SettingError
from sdjax.web import a1111, a1111_lists, docs, jobs, library, openai, uploads
from sdjax.web.auth import Auth, add_user
from sdjax.web.guard import Guard
from sdjax.web.services import Services

LOCAL = ("127.0.0.1", "localhost", "[::1]", "::1")
ENDED = "jobs wait for the next start"
PATIENCE = 20.0  # seconds that a worker has to end when the server ends
PAGE = "sdjax.web.page"  # the module whose mount(app, services) adds the page, if it exists
FOLDERS = ("models", "adapters", "data")


def create_app(place: Place, hosts: Sequence[str] | None = LOCAL, auth: Auth | None = None) -> FastAPI:
    """Returns the ASGI app of an existing place, without the page.

    hosts: accepted names in the Host header; None accepts any.  auth: its users; None asks for no password.
    Raises ValueError if the place's database is not one.
    """
    services = Services(place, Queue(place.queue), Library(place))
    app = FastAPI(title="sdjax", version=__version__, docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    app.state.services = services

    async def refused(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"detail": services.said(error)}, 422)

    for router in (
        jobs.router,
        uploads.router,
        library.router,
        a1111.router,
        a1111_lists.router,
        a1111_lists.controlnet,
        openai.router,
    ):
        app.include_router(router(services))
    docs.add(app)
    app.add_exception_handler(ValueError, refused)
    app.add_middleware(Guard, hosts=hosts, auth=auth)  # pyright: ignore[reportArgumentType]
    return app


def mount_page(app: FastAPI, wanted: bool = True) -> None:
    """Adds the page if it is wanted and its packages are installed, else a line that links to the API."""
    if wanted and importlib.util.find_spec(PAGE) is not None and importlib.util.find_spec("gradio") is not None:
        importlib.import_module(PAGE).mount(app, app.state.services)
        return

    @app.get("/", include_in_schema=False)
    def index() -> HTMLResponse:
        return HTMLResponse("<!doctype html><title>sdjax</title><p>sdjax: <a href=/docs>the API</a></p>")


# ---- the worker's keeper -----------------------------------------------------------------------------


class Keeper(threading.Thread):
    """Starts a worker whenever no process uses the device, until `stop`."""

    def __init__(self, place: Place, queue: Queue) -> None:
        super().__init__(daemon=True)
        self.place, self.queue, self.over = place, queue, threading.Event()
        self.process: subprocess.Popen | None = None
        self.pause, self.next = 0.5, 0.0  # seconds before another start; grows while workers die at once

    def run(self) -> None:
        """Runs in a thread: starts workers until `stop`."""
        while not self.over.is_set():
            if self._gone() and time.monotonic() >= self.next:
                self._start()
            self.over.wait(0.1)

    def _gone(self) -> bool:
        return self._alive() is None and not worker.taken(self.place)

    def _start(self) -> None:
        quick = self.process is not None and time.monotonic() - self.next < 30
        self.pause = min(30.0, self.pause * 2) if quick else 0.5
        log = os.open(self.place.root / "worker.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            self.process = subprocess.Popen(
                self.place.command(), start_new_session=True, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        finally:
            os.close(log)
        self.next = time.monotonic() + self.pause

    def stop(self) -> None:
        """Ends the worker between two steps; a training run saves first.  Its job waits again."""
        self.over.set()
        self.join()
        until = time.monotonic() + PATIENCE
        for pid in filter(
            None, {_holder(self.place), self._alive()}
        ):  # a worker that just started does not use the device yet
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        while (worker.taken(self.place) or self._alive()) and time.monotonic() < until:
            time.sleep(0.05)

    def _alive(self) -> int | None:
        """Returns the process number of the worker started here, None if it has ended."""
        return self.process.pid if self.process is not None and self.process.poll() is None else None


def _holder(place: Place) -> int | None:
    """Returns the number of the process that uses the device."""
    if not worker.taken(place):
        return None
    try:
        return int(place.device.read_text())
    except ValueError:
        return None


@contextlib.contextmanager
def kept(services: Services) -> Iterator[None]:
    """A context with a worker, and a thread that reads the library's metadata."""
    place, queue = services.place, services.queue
    queue.options(server=os.getpid())
    keeper, over = Keeper(place, queue), threading.Event()
    reader = threading.Thread(target=services.library.watch, args=(over,), daemon=True)
    keeper.start()
    reader.start()
    try:
        yield
    finally:
        over.set()
        queue.options(server=0)
        keeper.stop()


# ---- the program -----------------------------------------------------------------------------------


def parser(doc: str | None) -> flags.Parser:
    """Returns the command line's parser."""
    made = flags.Parser(doc, prog="sdjax ui")
    add = made.add_argument
    add("--model", default="pocket", help="default model: pocket, a model folder, a single file or a hub id")
    add("--models", type=Path, metavar="DIR", help="folder of models, autoencoders and ControlNets")
    add("--adapters", type=Path, metavar="DIR", help="folder of LoRA, embeddings and hypernetworks")
    add("--data", type=Path, metavar="DIR", help="folder whose subfolders hold training pictures")
    add("--dtype", default="float32", choices=pipeline.DTYPES, help="data type of the models; default: float32")
    add("--batch", type=int, default=4, help="pictures computed at once; default: 4")
    add(
        "--out",
        type=Path,
        default=Path("outputs/ui"),
        metavar="DIR",
        help="folder for the queue, uploads, pictures and runs; default: outputs/ui",
    )
    add("--host", default="127.0.0.1", help="address to listen on; default: 127.0.0.1; any other needs --auth")
    add("--port", type=int, default=7860, help="port to listen on; default: 7860")
    add("--api-only", action="store_true", help="serve the APIs without the page")
    add("--auth", type=Path, metavar="FILE", help="file with user names and hashed passwords")
    add("--add-user", metavar="NAME", help="ask for a password, store its hash in --auth FILE, and exit")
    return made


def main(doc: str | None, arguments: Sequence[str] | None = None) -> int:
    """Serves until Ctrl-C or SIGTERM; returns the exit status."""
    given = parser(doc).parse_args(arguments)
    return signals.ended(lambda: _main(given), ENDED)


def _main(given: Any) -> int:
    """Serves for a command line until it is told to stop; returns the exit status."""
    try:
        with one_line():
            private()
            if given.add_user is not None:
                return _new_user(given.auth, given.add_user)
            serve(given)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0


def _new_user(path: Path | None, name: str) -> int:
    if path is None:
        raise SettingError("auth", None, "a file, together with --add-user")
    password = getpass.getpass(f"password of {name}: ") if sys.stdin.isatty() else sys.stdin.readline().rstrip("\n")
    add_user(path, name, password)
    print(f"added {name}; start the server with --auth {path}")
    return 0


def serve(given: Any) -> None:
    """Serves the place of a command line.  Raises ValueError for invalid options."""
    begin = time.monotonic()
    place = _place(given)
    local = given.host in LOCAL or _loopback(given.host)
    if not local and given.auth is None:
        raise SettingError("host", given.host, "127.0.0.1, or --auth FILE with it")
    if not 0 <= given.port < 1 << 16:
        raise SettingError("port", given.port, "0 to 65535")
    auth = Auth(given.auth) if given.auth is not None else None
    with locks.held(place.root):
        place.made()
        if not worker.taken(place):  # a worker of the last server may still have the device
            accelerator.check_apart()
        app = create_app(place, (*LOCAL, given.host) if local else None, auth)
        with kept(app.state.services):
            mount_page(app, not given.api_only)
            _listen(app, given.host, given.port, lambda url: _say(url, begin))


def _place(given: Any) -> Place:
    for name in FOLDERS:
        folder = getattr(given, name)
        if folder is not None and not folder.is_dir():
            raise SettingError(name, str(folder), "a folder")
    if given.batch < 1:
        raise SettingError("batch", given.batch, "a whole number, 1 or more")
    folders = {name: path and path.absolute() for name, path in vars(given).items() if name in FOLDERS}
    return Place(given.out.absolute(), given.model, **folders, dtype=given.dtype, batch=given.batch)


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _say(url: str, begin: float) -> None:
    print(f"sdjax: {url} ({time.monotonic() - begin:.1f} s); API: {url}/docs; Ctrl-C stops the server", flush=True)


def _listen(app: FastAPI, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serves until SIGTERM or Ctrl-C.  Raises OSError if the address is in use."""
    import socket

    import uvicorn

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host.strip("[]"), port))
        except OSError as error:
            raise OSError(f"host={host} port={port}: {error.strerror}; choose another --port") from None
        listener.listen(128)
        shown = f"[{host}]" if ":" in host else host
        ready(f"http://{shown}:{listener.getsockname()[1]}")
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=5,
            proxy_headers=False, h11_max_incomplete_event_size=1 << 16,
        )  # fmt: skip
        server = uvicorn.Server(config)
        server.capture_signals = lambda: _caught(
            server.handle_exit
        )  # uvicorn's handler raises the signal again at the end
        server.run([listener])


@contextlib.contextmanager
def _caught(handle: Any) -> Iterator[None]:
    """A context that passes SIGTERM and Ctrl-C to a function; what follows is the end, which none disturbs."""
    for one in signals.BOTH:
        signal.signal(one, handle)
    try:
        yield
    finally:
        signals.ending(ENDED)
