"""A bucket on this machine: as much of S3's protocol as reading needs, so that Arrow's client is tested without one.

with serving({"photos/a.tar": b"..."}) as (endpoint, asked):
    ...                                                     # asked: (method, path, range) of each request
"""

import contextlib
import http.server
import threading
import urllib.parse
from xml.sax.saxutils import escape

PAGE = 2  # objects per answer to a list, so that clients turn pages


class Bucket(http.server.BaseHTTPRequestHandler):
    """Answers ListObjectsV2, HeadObject and GetObject with a range, of any bucket's name."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        place = urllib.parse.urlsplit(self.path)
        name = urllib.parse.unquote(place.path).lstrip("/").partition("/")[2]
        query = dict(urllib.parse.parse_qsl(place.query, keep_blank_values=True))
        self.server.asked.append((self.command, name, self.headers.get("Range", "")))
        if not name:
            return self.send(200, self.listed(query).encode(), body, {"Content-Type": "application/xml"})
        if name not in self.server.objects:
            missing = b"<Error><Code>NoSuchKey</Code><Message>none</Message></Error>"
            return self.send(404, missing, body, {"Content-Type": "application/xml"})
        data = self.server.objects[name]
        headers = {"ETag": '"0"', "Last-Modified": "Mon, 30 Nov 2026 00:00:00 GMT", "Accept-Ranges": "bytes"}
        if wanted := self.headers.get("Range"):
            first, last = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
            headers["Content-Range"] = f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}"
            return self.send(206, data[first : last + 1], body, headers)
        self.send(200, data, body, headers)

    def listed(self, query):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        keys, folders = [], set()
        for name in sorted(name for name in self.server.objects if name.startswith(prefix)):
            inner = name[len(prefix) :]
            if delimiter and delimiter in inner:
                folders.add(prefix + inner.split(delimiter)[0] + delimiter)
            else:
                keys.append(name)
        start = int(query.get("continuation-token", 0))
        more, shown = len(keys) > start + PAGE, keys[start : start + PAGE]
        objects = "".join(
            f"<Contents><Key>{escape(name)}</Key><Size>{len(self.server.objects[name])}</Size>"
            "<LastModified>2026-11-30T00:00:00.000Z</LastModified></Contents>" for name in shown
        )  # fmt: skip
        inner = "".join(f"<CommonPrefixes><Prefix>{escape(one)}</Prefix></CommonPrefixes>" for one in sorted(folders))
        token = f"<NextContinuationToken>{start + PAGE}</NextContinuationToken>" if more else ""
        return (
            '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Prefix>{escape(prefix)}</Prefix><KeyCount>{len(shown)}</KeyCount><IsTruncated>{str(more).lower()}"
            f"</IsTruncated>{token}{objects}{inner}</ListBucketResult>"
        )

    def send(self, status, data, body, headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(data), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if body:
            self.wfile.write(data)


@contextlib.contextmanager
def serving(objects):
    """Yields (the endpoint, the list of requests) of a server of {name in the bucket: bytes}."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    server.objects, server.asked = objects, []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
