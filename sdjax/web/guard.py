"""Checks before every endpoint: Host, Origin, password and request size.

A page of another site can make a browser send requests to 127.0.0.1, but with a foreign Origin or Host.  The server
sends no CORS header, so such a page cannot read responses either.
"""

from collections.abc import Collection
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sdjax.web.auth import Auth, Wait

MOST_BODY = 256 << 20  # most bytes of a request: a set of pictures
MOST_JSON = 96 << 20  # most bytes of a JSON request: a few pictures in base64
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"SAMEORIGIN"),
    (b"referrer-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
]


class Guard:
    """An ASGI app in front of another.

    hosts: accepted names in the Host header; None accepts any and needs `auth`.  auth: None asks for no password.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str] | None, auth: Auth | None) -> None:
        self.app, self.hosts, self.auth = app, hosts, auth

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on or refuses it."""
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        refusal = self._refusal(scope, headers) or await self._unknown(scope, headers)
        if refusal is not None and scope["type"] == "websocket":
            await receive()
            return await send({"type": "websocket.close", "code": 1008})
        if refusal is not None:
            return await refusal(scope, receive, _with_headers(send))
        await self.app(scope, _limited(receive, _most(headers)), _with_headers(send))

    def _refusal(self, scope: Scope, headers: Headers) -> JSONResponse | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.hosts is not None and name(host) not in self.hosts:
            return _answer(403, f"host {host[:80]!r}: expected one of {', '.join(sorted(self.hosts))}")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            return _answer(403, f"origin {origin[:80]!r}: expected this server's own page")
        crosses = headers.get("sec-fetch-site", "none") == "cross-site"
        if crosses and (scope.get("method") != "GET" or headers.get("sec-fetch-mode") != "navigate"):
            return _answer(403, "a request from another site; expected this server's own page")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 18 or int(length) > _most(headers):
            return _answer(413, f"{length[:20]} bytes: expected at most {_most(headers)}")
        return None

    async def _unknown(self, scope: Scope, headers: Headers) -> JSONResponse | None:
        if self.auth is None:
            return None
        address, header = (scope.get("client") or ("",))[0], headers.get("authorization", "")
        if self.auth.knows(header):
            return None
        try:
            if await run_in_threadpool(self.auth.check, header, address):
                return None
        except Wait as wait:
            return _answer(429, "too many wrong passwords; wait", {"Retry-After": str(int(wait.seconds) + 1)})
        return _answer(401, "a name and a password are required", {"WWW-Authenticate": 'Basic realm="sdjax"'})


def name(host: str) -> str:
    """Returns the name of a Host header, without the port: "127.0.0.1", "[::1]"."""
    end = host.rfind("]")
    return (host[: end + 1] if end > 0 else host.partition(":")[0]).lower()


def _most(headers: Headers) -> int:
    return MOST_BODY if headers.get("content-type", "").startswith("multipart/") else MOST_JSON


def _answer(status: int, said: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"detail": said}, status, headers)


def _limited(receive: Receive, most: int) -> Receive:
    """Returns a `receive` that ends a request whose body exceeds the limit."""
    left = most

    async def limited() -> Message:
        nonlocal left
        message = await receive()
        left -= len(message.get("body", b""))
        if left < 0:
            raise HTTPException(413, f"expected at most {most} bytes")
        return message

    return limited


def _with_headers(send: Send) -> Send:
    async def sends(message: Message) -> None:
        if message["type"] == "http.response.start":
            there: list[Any] = list(message.get("headers", []))
            message = {**message, "headers": there + HEADERS}
        await send(message)

    return sends
