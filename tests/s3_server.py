"""A bucket on this machine: as much of S3's protocol as reading needs, so that Arrow's client is tested without one.

with serving({"photos/a.tar": b"..."}) as (endpoint, asked):
    ...                                                     # asked: (method, path, range) of each request
"""

import contextlib
import urllib.parse
from xml.sax.saxutils import escape

import file_server

PAGE = 2  # objects per answer to a list, so that clients turn pages
XML = {"Content-Type": "application/xml"}
OBJECT = {"ETag": '"0"', "Last-Modified": "Mon, 30 Nov 2026 00:00:00 GMT", "Accept-Ranges": "bytes"}


def answer(request, objects, asked):
    """Answers ListObjectsV2, HeadObject and GetObject with a range, of any bucket's name."""
    place = urllib.parse.urlsplit(request.path)
    name = urllib.parse.unquote(place.path).lstrip("/").partition("/")[2]
    asked.append((request.command, name, request.headers.get("Range", "")))
    if not name:
        query = dict(urllib.parse.parse_qsl(place.query, keep_blank_values=True))
        return 200, listed(objects, query).encode(), XML
    if name not in objects:
        return 404, b"<Error><Code>NoSuchKey</Code><Message>none</Message></Error>", XML
    return file_server.ranged(request, objects[name], OBJECT)


def listed(objects, query):
    """Returns a page of the objects below query["prefix"]."""
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    keys, folders = [], set()
    for name in sorted(name for name in objects if name.startswith(prefix)):
        inner = name[len(prefix) :]
        if delimiter and delimiter in inner:
            folders.add(prefix + inner.split(delimiter)[0] + delimiter)
        else:
            keys.append(name)
    start = int(query.get("continuation-token", 0))
    more, shown = len(keys) > start + PAGE, keys[start : start + PAGE]
    found = "".join(
        f"<Contents><Key>{escape(name)}</Key><Size>{len(objects[name])}</Size>"
        "<LastModified>2026-11-30T00:00:00.000Z</LastModified></Contents>" for name in shown
    )  # fmt: skip
    inner = "".join(f"<CommonPrefixes><Prefix>{escape(one)}</Prefix></CommonPrefixes>" for one in sorted(folders))
    token = f"<NextContinuationToken>{start + PAGE}</NextContinuationToken>" if more else ""
    return (
        '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Prefix>{escape(prefix)}</Prefix><KeyCount>{len(shown)}</KeyCount><IsTruncated>{str(more).lower()}"
        f"</IsTruncated>{token}{found}{inner}</ListBucketResult>"
    )


@contextlib.contextmanager
def serving(objects):
    """Yields (the endpoint, the list of requests) of a server of {name in the bucket: bytes}."""
    asked = []
    with file_server.serving(lambda request: answer(request, objects, asked)) as address:
        yield address, asked
