"""SHA-256 of files, cached on disk by path, size and time, as in A1111.

    sha256("v1-5.safetensors")                       # reads 4 GB once per machine
    autov2("cat.pt"), autov3("cat.safetensors")      # the hashes in A1111 and on Civitai

The cache is sdjax/hashes.json in the user's cache folder ($XDG_CACHE_HOME or ~/.cache), or the file $SDJAX_HASHES:
{path: {"size": bytes, "time": ns, "sha256": {first byte: hash}}}.  Damaged entries are ignored.  If the file cannot be
written, only this process remembers its hashes.
Source: AUTOMATIC1111's stable-diffusion-webui 1.10, modules/hashes and modules/cache.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdjax.formats.storage import files

MOST = 10_000  # most files in the cache
HASH = re.compile("[0-9a-f]{64}")


def sha256(path: str | Path, start: int = 0) -> str:
    """Returns the SHA-256, 64 hex digits, of a file from byte `start` on.  Raises OSError for an unreadable file."""
    path = os.path.realpath(path)
    state = os.stat(path)
    return _sha256(path, start, state.st_size, state.st_mtime_ns)


def autov2(path: str | Path) -> str:
    """Returns the first 10 hex digits of a file's SHA-256, used for models and embeddings ("TI hashes")."""
    return sha256(path)[:10]


def autov3(path: str | Path) -> str:
    """Returns the 12 hex digits of "Lora hashes": of a safetensors file without its header, or of another file.

    Source: kohya's sshs_model_hash; A1111 and Civitai show its first digits.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        return sha256(path)[:12]
    with open(path, "rb") as file:
        return sha256(path, 8 + int.from_bytes(file.read(8), "little"))[:12]


def of_folder(path: str | Path) -> str:
    """Returns 12 hex digits for a folder of weights, from the SHA-256 of its files' names and hashes."""
    files = sorted(file for file in Path(path).rglob("*") if file.is_file())
    lines = "".join(f"{sha256(file)}  {file.relative_to(path).as_posix()}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()[:12]


@functools.lru_cache(maxsize=MOST)
def _sha256(path: str, start: int, size: int, time: int) -> str:
    known = _hashes(_read().get(path), size, time).get(str(start))
    if known is not None:
        return known
    total = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(start)
        while part := file.read(1 << 20):
            total.update(part)
        after = os.fstat(file.fileno())
    if (after.st_size, after.st_mtime_ns) == (size, time):  # otherwise it changed during reading
        with contextlib.suppress(OSError, ValueError):
            _keep(path, start, size, time, total.hexdigest())
    return total.hexdigest()


def place() -> Path:
    """Returns the path of the cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SDJAX_HASHES") or Path(cache) / "sdjax" / "hashes.json")


def _read() -> dict[str, Any]:
    """Returns the content of the cache, {} if it is missing or damaged."""
    try:
        return files.read_json(place())
    except (OSError, ValueError):
        return {}


def _hashes(entry: Any, size: int, time: int) -> dict[str, str]:
    """Returns {first byte: hash} from a file's entry, {} if it is damaged or has another size or time."""
    if not isinstance(entry, dict) or (entry.get("size"), entry.get("time")) != (size, time):
        return {}
    found = entry.get("sha256")
    found = found if isinstance(found, dict) else {}
    return {at: one for at, one in found.items() if isinstance(one, str) and HASH.fullmatch(one)}


def _keep(path: str, start: int, size: int, time: int, found: str) -> None:
    """Adds a hash to the cache, the newest last, and drops the oldest beyond MOST files."""
    file = place()
    file.parent.mkdir(parents=True, exist_ok=True)
    with _alone(file.with_name(f".{file.name}.lock")), files.new_file(file) as temporary:
        kept = _read()
        known = _hashes(kept.pop(path, None), size, time)
        kept[path] = {"size": size, "time": time, "sha256": {**known, str(start): found}}
        temporary.write_text(json.dumps(dict(list(kept.items())[-MOST:]), indent=1), encoding="utf-8")


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Locks a file: one thread of one process at a time is in this context."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
