"""A web server on this machine whose answers are a function, so that clients are tested without a network.

with serving(lambda request: ranged(request, b"...", {})) as address:
    ...                                                                # request: .command, .path, .headers
"""

import contextlib
import http.server
import threading


class Handler(http.server.BaseHTTPRequestHandler):
    """Sends what the server's `answer` returns: (status, bytes, headers)."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.send()

    def do_GET(self):
        self.wfile.write(self.send())

    def send(self):
        status, data, headers = self.server.answer(self)
        self.send_response(status)
        for name, value in {"Content-Length": len(data), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        return data


def ranged(request, data, headers):
    """Returns the answer of a file: all of it, or the bytes of the request's Range."""
    wanted = request.headers.get("Range")
    if not wanted:
        return 200, data, headers
    first, last = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
    part = data[first : last + 1]
    return 206, part, {**headers, "Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(data)}"}


@contextlib.contextmanager
def serving(answer):
    """Yields the address of a server; answer(request) returns (status, bytes, headers)."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.answer = answer
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
