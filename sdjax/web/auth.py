"""Passwords for a server on the network: a file with hashes, and a limit on attempts.

    NAME:scrypt:16384:8:1:SALT:HASH         one line per user, written by `sdjax ui --auth FILE --add-user NAME`

Clients of A1111's API use Basic authentication; OpenAI's clients send "NAME:PASSWORD" as their key.
"""

import base64
import binascii
import contextlib
import hashlib
import hmac
import secrets
import threading
import time
from pathlib import Path

from sdjax.formats.storage import files

COST = (1 << 14, 8, 1)  # n, r, p of scrypt: 16 MB and about 50 ms a try (RFC 7914's interactive use)
LENGTH = 32
SHORTEST = 8  # fewest characters of a password
TRIES, SPAN = 5, 60.0  # failed attempts of an address within so many seconds before it must wait
ALL_TRIES = 50  # the same for all addresses together
KEPT = 1000  # cached right passwords, which are not hashed again


def hashed(password: str, salt: bytes | None = None) -> str:
    """Returns the salted hash of a password for the file."""
    salt = secrets.token_bytes(16) if salt is None else salt
    return ":".join(["scrypt", *map(str, COST), salt.hex(), _scrypt(password, salt, *COST).hex()])


def _scrypt(password: str, salt: bytes, n: int, r: int, p: int) -> bytes:
    return hashlib.scrypt(password.encode(), salt=salt, n=n, r=r, p=p, dklen=LENGTH, maxmem=256 * n * r)


def add_user(path: Path, name: str, password: str) -> None:
    """Adds a user to a file readable by its owner only.  Raises ValueError for an invalid name or password."""
    if not name or not name.isprintable() or ":" in name or name != name.strip():
        raise ValueError(f"user {name!r}: expected a name without ':'")
    if len(password) < SHORTEST:
        raise ValueError(f"password: expected at least {SHORTEST} characters")
    users = _read(path) if path.is_file() else {}
    users[name] = hashed(password)
    with files.new_file(path) as temporary:
        temporary.touch(mode=0o600)
        temporary.write_text("".join(f"{user}:{line}\n" for user, line in users.items()), encoding="utf-8")


def _read(path: Path) -> dict[str, str]:
    """Returns {name: hash} of a file.  Raises ValueError for an invalid line without showing it."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"auth={str(path)!r}: cannot be read: {error}") from None
    found = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, rest = line.partition(":")
        parts = rest.split(":")
        if not name or len(parts) != 6 or parts[0] != "scrypt" or not all(part.isdecimal() for part in parts[1:4]):
            raise ValueError(f"auth={str(path)!r}: line {number}: expected what `sdjax ui --add-user NAME` writes")
        found[name] = rest
    return found


class Wait(Exception):
    """An address must wait before another attempt; seconds: how long."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds


class Auth:
    """The users of a file, and recent attempts that failed or still run.

    Raises ValueError for a file that is unreadable, has no user, or is readable by others.
    """

    def __init__(self, path: Path) -> None:
        self.users = _read(path)
        if not self.users:
            raise ValueError(f"auth={str(path)!r}: no user; add one with --add-user NAME")
        if path.stat().st_mode & 0o077:
            raise ValueError(f"auth={str(path)!r}: other users can read this file; run chmod 600 on it")
        self.secret, self.right = secrets.token_bytes(32), dict[bytes, None]()
        self.failed: dict[str, list[float]] = {}
        self.lock, self.nobody = threading.Lock(), hashed(secrets.token_hex())

    def knows(self, header: str) -> bool:
        """Returns whether a header's password was right before, which costs no attempt and no hashing."""
        given = credentials(header)
        return given is not None and self._mark(*given) in self.right

    def _mark(self, name: str, password: str) -> bytes:
        return hmac.digest(self.secret, f"{name}\0{password}".encode(), "sha256")

    def check(self, header: str, address: str) -> bool:
        """Returns whether an Authorization header has a user's right password.

        Raises Wait if the address, or all together, failed too often.  An attempt counts from its beginning, so that
        many at once are few too, until its password is found to be right.
        """
        given = credentials(header)
        if given is None:
            return False
        name, password = given
        at = self._begun(address)
        kept = self.users.get(name, self.nobody)  # so that an unknown name takes as long as a known one
        _, n, r, p, salt, wanted = kept.split(":")
        made = _scrypt(password, bytes.fromhex(salt), int(n), int(r), int(p))
        right = hmac.compare_digest(made, bytes.fromhex(wanted)) and name in self.users
        with self.lock:
            if right:
                self.right[self._mark(name, password)] = None
                while len(self.right) > KEPT:
                    self.right.pop(next(iter(self.right)))
                with contextlib.suppress(KeyError, ValueError):  # forgotten after SPAN
                    self.failed[address].remove(at)
        return right

    def _begun(self, address: str) -> float:
        """Counts an attempt and returns its time.  Raises Wait instead if there were too many."""
        with self.lock:
            now = time.monotonic()
            self.failed = {
                one: kept for one, times in self.failed.items() if (kept := [at for at in times if now - at < SPAN])
            }
            own = self.failed.get(address, [])
            every = [at for times in self.failed.values() for at in times]
            if len(own) >= TRIES:
                raise Wait(SPAN - (now - own[0]))
            if len(every) >= ALL_TRIES:
                raise Wait(SPAN - (now - min(every)))
            self.failed.setdefault(address, []).append(now)
            return now


def credentials(header: str) -> tuple[str, str] | None:
    """Returns (name, password) of an Authorization header, Basic or Bearer NAME:PASSWORD; None for another."""
    scheme, _, rest = header.partition(" ")
    if scheme.lower() == "basic":
        try:
            rest = base64.b64decode(rest, validate=True).decode()
        except (binascii.Error, ValueError):
            return None
    elif scheme.lower() != "bearer":
        return None
    name, colon, password = rest.partition(":")
    return (name, password) if colon and len(rest) < 1000 else None
