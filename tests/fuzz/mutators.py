"""Damages a file's bytes, the same for the same seed: any bytes, or the structure of its format.

damaged = mutate(data, "lora.safetensors", np.random.default_rng((seed, number)))
"""

import io
import json
import pickle
import re
import struct
import warnings
import zipfile
import zlib

HUGE = (0, 1, -1, 2**31, 2**63, 2**64 - 1, -(2**63), 10**18, 10**400, 1e308, float("inf"), float("nan"))
TEXT = 1 << 18  # `digits` looks for numbers in the first bytes of a file
ODD = (
    *HUGE,
    None,
    True,
    False,
    "",
    "x" * 5000,
    "\0",
    "../../etc/passwd",
    "é\u202e",
    [],
    {},
    [[]],
    {"": None},
    [1, "a"],
)


def mutate(data: bytes, name: str, random) -> bytes:
    """Returns damaged bytes: one to three changes; if the format is known, half of them aim at its structure."""
    own = INSIDE.get(_kind(data, name))
    for _ in range(int(random.integers(1, 4))):
        change = own if own is not None and random.random() < 0.5 else _pick(random, ANY)
        try:
            data = change(data, random)
        except Exception:
            data = _pick(random, ANY)(data, random)  # an earlier change removed what this one needs
    return data


def _kind(data, name):
    """Returns a file's format, by its first bytes and its name; None if it is unknown."""
    if data.startswith(b"PK"):
        return "zip"
    if data.startswith(b"\x89PNG"):
        return "png"
    if data.startswith(b"PAR1"):
        return "parquet"
    if data[8:9] == b"{" and name.endswith(".safetensors"):
        return "safetensors"
    if name.endswith((".json", ".jsonl")):
        return "json"
    return "pickle" if data[:1] == b"\x80" else None


def _pick(random, items):
    return items[int(random.integers(len(items)))]


def _place(data, random, room=0):
    return int(random.integers(max(1, len(data) - room)))


# ---- for any file ------------------------------------------------------------------------------


def flip(data, random):
    """One to eight bytes change."""
    some = bytearray(data)
    for _ in range(int(random.integers(1, 9)) if some else 0):
        some[_place(some, random)] = int(random.integers(256))
    return bytes(some)


def flip_early(data, random):
    """One to eight bytes of the first kilobyte change, where headers are."""
    return flip(data[:1024], random) + data[1024:]


def cut(data, random):
    """The file ends early."""
    return data[: _place(data, random)]


def lengthen(data, random):
    """Bytes follow the end."""
    return data + bytes(random.integers(0, 256, int(random.integers(1, 2000)), dtype="uint8"))


def swap(data, random):
    """Two ranges change places."""
    length = int(random.integers(1, 64))
    a, b = sorted((_place(data, random, length), _place(data, random, length)))
    return data[:a] + data[b : b + length] + data[a + length : b] + data[a : a + length] + data[b + length :]


def repeat(data, random):
    """A range of bytes repeats."""
    a = _place(data, random)
    length = int(random.integers(1, 400))
    return data[: a + length] + data[a:]


def number(data, random):
    """Eight, four or two bytes become a number at an edge of its type."""
    form = _pick(random, ("<Q", "<q", "<I", ">I", "<i", "<H"))
    size, at = struct.calcsize(form), _place(data, random, 8)
    high = (1 << 8 * size) - 1
    value = _pick(random, (0, 1, high >> 1, high >> 2) if form[1] in "qi" else (0, 1, high, high >> 1))
    return data[:at] + struct.pack(form, value) + data[at + size :]


def digits(data, random):
    """A number written as text becomes a huge, negative or invalid one."""
    spans = [found.span() for found in re.finditer(rb"[0-9]+", data[:TEXT])]
    if not spans:
        return flip(data, random)
    at, end = _pick(random, spans)
    return data[:at] + str(_pick(random, HUGE)).encode() + data[end:]


ANY = (flip, flip_early, cut, lengthen, swap, repeat, number, digits)


# ---- for one format ----------------------------------------------------------------------------


def change(value, random, depth=0):
    """Returns JSON-like data with one change: a value, a key, a type, or far too deep nesting."""
    if isinstance(value, dict) and value and random.random() < 0.85:
        key = _pick(random, list(value))
        what = random.random()
        if what < 0.7:
            return {**value, key: change(value[key], random, depth + 1)}
        if what < 0.8:
            return {name: one for name, one in value.items() if name != key}
        other = _pick(random, ("", "x" * 300, "../x", "0", key + ".", key.upper() if isinstance(key, str) else "k"))
        return {**value, other: value[key]}
    if isinstance(value, list) and value and random.random() < 0.85:
        at = int(random.integers(len(value)))
        return [*value[:at], change(value[at], random, depth + 1), *value[at + 1 :]]
    if random.random() < 0.05:
        for _ in range(int(random.integers(50, 3000))):
            value = [value]
        return value
    if isinstance(value, str) and random.random() < 0.4:
        at = int(random.integers(len(value) + 1))
        return value[:at] + _pick(random, ("\n", "\0", "<", ":", "..", "é", "9" * 30, "%s", " ")) + value[at:]
    return _pick(random, ODD)


def _json(data, random):
    """Changes one line of JSON, or the whole file."""
    lines = data.split(b"\n")
    at = int(random.integers(len(lines)))
    try:
        lines[at] = json.dumps(change(json.loads(lines[at]), random)).encode()
        return b"\n".join(lines)
    except ValueError:
        return json.dumps(change(json.loads(data), random)).encode()


def _safetensors(data, random):
    """Changes the header: names, types, shapes, overlapping or wrong offsets, or a wrong length of the header."""
    length = struct.unpack("<Q", data[:8])[0]
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    what = random.random()
    if what < 0.6:
        header = change(header, random)
    elif what < 0.8:  # two tensors in one place, or one beyond the end
        names = [name for name in header if name != "__metadata__"]
        one, other = _pick(random, names), _pick(random, names)
        moved = header[other]["data_offsets"] if random.random() < 0.5 else [0, _pick(random, (2**40, 2**63, -5, 3))]
        header[one] = {**header[one], "data_offsets": moved}
    else:
        return struct.pack("<Q", _pick(random, (0, 1, length + 1, length - 1, 2**62, 2**64 - 1))) + data[8:]
    text = json.dumps(header).encode()
    if random.random() < 0.1:  # the same key twice
        text = text[:-1] + b", " + text[1:]
    return struct.pack("<Q", len(text)) + text + rest


def _zip(data, random):
    """Changes one member: damages, removes, renames or copies it, or replaces it with zeros."""
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        members = [(item.filename, old.read(item)) for item in old.infolist()]
    at = int(random.integers(len(members)))
    name, held = members[at]
    what = random.random()
    if what < 0.6:
        pickles = [i for i, (one, _) in enumerate(members) if one.endswith(".pkl")]
        at = pickles[0] if pickles and random.random() < 0.8 else at
        name, held = members[at]
        members[at] = (name, _pickle(held, random) if name.endswith(".pkl") else _pick(random, ANY)(held, random))
    elif what < 0.7:
        del members[at]
    elif what < 0.8:
        members[at] = (_pick(random, ("", "../x", name + "x", "a/" + name, name.replace("data", "date"))), held)
    elif what < 0.9:
        members.insert(at, (name + "2", held))
    else:
        members[at] = (name, bytes(int(random.integers(1, 1 << 22))))
    made = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about duplicate names
        _packed(made, members, random)
    return made.getvalue()


def _packed(made, members, random):
    """Writes an archive of members, each (name, bytes)."""
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED if random.random() < 0.3 else zipfile.ZIP_STORED) as new:
        for name, held in members:
            new.writestr(name, held)


PARTS = (  # pieces of pickles: numbers, containers, memo, marks, globals
    b"I-1\n", b"K\xff", b"J\xff\xff\xff\x7f", b"\x8a\x10" + b"\xff" * 16, b"G\x7f\xf0" + b"\0" * 6, b"N", b"\x88",
    b"]", b"}", b")", b"(", b"t", b"l", b"d", b"a", b"e", b"s", b"u", b"0", b"2", b"1", b".", b"h\0", b"h\xff", b"q\0",
    b"R", b"b", b"\x81", b"Q", b"cos\nsystem\n", b"cbuiltins\neval\n", b"c__builtin__\nset\n", b"X\x03\0\0\0abc",
    b"B\xff\xff\xff\x7f", b"X\xff\xff\xff\xff", b"\x8f", b"\x90", b"\x85", b"\x86", b"\x87", b"\x94",
    b"\x95" + b"\xff" * 8,
)  # fmt: skip


def _pickle(data, random):
    """Inserts an instruction over 0 to 2 bytes, or returns the pickle of a changed embedding."""
    if random.random() < 0.2:
        value = change({"string_to_param": {"*": [1.0]}, "step": 3, "name": "x"}, random)
        return pickle.dumps(value, protocol=int(random.integers(0, 5)))
    at = _place(data, random)
    return data[:at] + _pick(random, PARTS) + data[at + int(random.integers(0, 3)) :]


def _png(data, random):
    """Removes or repeats one chunk, or changes its kind or data, or the picture's size; checksums are right."""
    chunks, at = [], 8
    while at < len(data):
        length = struct.unpack(">I", data[at : at + 4])[0]
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    i = int(random.integers(len(chunks)))
    kind, held = chunks[i]
    what = random.random()
    if what < 0.2:
        del chunks[i]
    elif what < 0.3:
        chunks.insert(i, chunks[i])
    elif what < 0.45 and chunks[0][0] == b"IHDR":
        side = _pick(random, (0, 1, 30_000, 2**31 - 1, 2**31))
        chunks[0] = (b"IHDR", struct.pack(">II", side, _pick(random, (1, side))) + chunks[0][1][8:])
    elif what < 0.75 and any(k in (b"tEXt", b"iTXt", b"zTXt") for k, _ in chunks):
        i = _pick(random, [i for i, (k, _) in enumerate(chunks) if k in (b"tEXt", b"iTXt", b"zTXt")])
        chunks[i] = (chunks[i][0], _pick(random, ANY)(chunks[i][1], random))
    else:
        chunks[i] = (
            _pick(random, (kind, b"zTXt", b"iTXt", b"acTL", b"eXIf", b"PLTE")),
            _pick(random, ANY)(held, random),
        )
    return data[:8] + b"".join(
        struct.pack(">I", len(held)) + kind + held + struct.pack(">I", zlib.crc32(kind + held)) for kind, held in chunks
    )


def _parquet(data, random):
    """Damages the footer, which has the layout, or its length."""
    length = struct.unpack("<I", data[-8:-4])[0]
    start = len(data) - 8 - length
    footer = _pick(random, (flip, swap, repeat, number, cut))(data[start:-8], random)
    said = len(footer) if random.random() < 0.8 else _pick(random, (0, 2**31, 2**32 - 1, length + 5))
    return data[:start] + footer + struct.pack("<I", said) + b"PAR1"


INSIDE = {
    "json": _json,
    "safetensors": _safetensors,
    "zip": _zip,
    "pickle": _pickle,
    "png": _png,
    "parquet": _parquet,
}
