"""Reads files of torch.save (.pt, .ckpt, .bin) without torch and without executing code.

    values = read("model.ckpt")                 # dicts, lists, numbers, text and numpy arrays
    values["state_dict"]["betas"]               # read-only, memory-mapped: takes memory only when it is used

A pickle is a program for a stack machine.  This machine cannot import: a file may use only the names in GLOBALS, which
map to functions of this module, number types or plain names.  Any other name is an error.  It reads both containers:
the archive (torch 1.6 and later) and the older sequence of pickles followed by the numbers.
Source: the pickle protocol (PEP 3154, CPython's pickletools); torch/serialization.py for the containers.
"""

import io
import math
import mmap
import os
import pickletools
import struct
import sys
import types
import zlib
from typing import Any

import ml_dtypes
import numpy as np

from sdjax.formats.storage.archives import check, records
from sdjax.formats.storage.pickle_machine import ENTRY, REPEATS, Machine, Storage
from sdjax.formats.storage.plain_values import STEPS, plain

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # torch/serialization.py: the start of the older container
PICKLE_SIZE = 64 * 2**20  # most bytes without tensors; Stable Diffusion with its optimizer has fewer than 2**20
INTEGER_BITS = 128  # most bits of an integer; MAGIC has 77
LONG = 2**62  # limit of sizes, strides and offsets
KEY = 2**60  # limit of integer keys: Python's hashes repeat from 2**61 - 1 on, and many equal hashes take forever
NUMBERS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")  # numpy's types; never objects


def read(path: str | os.PathLike[str]) -> Any:
    """Returns the value of a torch.save file: dict, list, tuple, set, str, bytes, int, float, bool, None, numpy arrays.

    Tensors become read-only, memory-mapped arrays with the saved shape, strides and type (bfloat16: ml_dtypes).
    Parameters become arrays, state dicts and ParameterDicts plain dicts {name: array}, torch.Size a tuple, and numpy's
    scalars numbers.  torch.float32 and Lightning's callback classes become their dotted names.
    Raises ValueError in one line, naming the file, if it is damaged, too large or needs anything else.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file")
    try:
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return plain(_read_archive(data) if data[:2] == b"PK" else _read_row(data))
    except Exception as error:  # a damaged file may raise any error, here or in a library
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{path}: cannot be read: {reason}") from None


# ---- containers --------------------------------------------------------------------------------


def _read_archive(data: mmap.mmap) -> Any:
    """Returns the value of an archive with NAME/data.pkl, NAME/data/0, NAME/data/1, ..."""
    found = records(data)
    programs = [name for name in found if name.count("/") == 1 and name.endswith("/data.pkl")]
    check(len(programs) == 1, f"an archive with {len(programs)} files data.pkl; one is expected")
    root = programs[0].removesuffix("data.pkl")

    def content(name: str) -> bytes:
        start, size, checksum = found[root + name]
        check(size <= PICKLE_SIZE, f"{name} of {size} bytes; at most {PICKLE_SIZE} are read")
        raw = data[start : start + size]
        check(zlib.crc32(raw) == checksum, f"{name} is damaged: its checksum differs")
        return raw

    def storage(kind: np.dtype, key: str, count: int) -> np.ndarray:
        check(f"{root}data/{key}" in found, f"no record {key!r}")
        start, size, _ = found[f"{root}data/{key}"]
        check(size == count * kind.itemsize, f"record {key!r} of {size} bytes for {count} numbers of type {kind}")
        return np.ndarray((count,), kind, data, start)

    check(root + "byteorder" not in found or content("byteorder") == b"little", "numbers are not little-endian")
    return _run(io.BytesIO(content("data.pkl")), storage, len(data))


def _read_row(data: mmap.mmap) -> Any:
    """Returns the value of the older container: pickles, the last of them listing storages; then each one's numbers."""
    head = io.BytesIO(data[:PICKLE_SIZE])

    def part(storage=None):
        return _run(head, storage, len(data))

    check(part() == MAGIC, "neither an archive nor the older format of torch.save")
    check(part() == PROTOCOL, f"of another protocol than {PROTOCOL}")
    system = part()
    check(type(system) is dict and system.get("little_endian") is True, "numbers are not little-endian")
    begin, asked = head.tell(), {}

    def ask(kind, key, count):
        """Records the type of a storage, which only this pickle gives; returns a placeholder for its numbers."""
        check(asked.setdefault(key, (kind, count)) == (kind, count), f"storage {key!r} has two types or sizes")
        return np.ndarray((count,), kind, data)

    part(ask)
    places = _places(data, part(), asked, head.tell())
    head.seek(begin)
    return part(lambda kind, key, count: np.ndarray((count,), kind, data, places[key]))


def _places(data: mmap.mmap, keys: Any, asked: dict[Any, tuple[np.dtype, int]], position: int) -> dict[str, int]:
    """Returns {key: start of its numbers} for consecutive storages from a position on."""
    check(type(keys) is list and all(type(key) is str for key in keys), "a list of storages is expected")
    check(sorted(keys) == sorted(asked), "the storages are not those that the tensors name")
    places = {}
    for key in keys:
        kind, wanted = asked[key]
        (count,) = struct.unpack_from("<q", data, position)
        check(count == wanted, f"storage {key!r} has {count} numbers, not {wanted}")
        places[key], position = position + 8, position + 8 + count * kind.itemsize
        check(position <= len(data), f"storage {key!r} is cut off")
    return places


# ---- what a file may name ----------------------------------------------------------------------


def _tensor(storage, offset, size, stride, *_):
    """Returns a view of a storage, with strides in numbers; ignores gradients and hooks."""
    window = type(storage) is np.ndarray and storage.ndim == 1 and not storage.flags.owndata
    check(window, "a tensor without a storage")
    _check_shape(size)
    _check_shape(stride)
    _check_shape((offset,))
    check(len(size) == len(stride), "a tensor with other strides than sizes")
    kind, number = storage.dtype, math.prod(size)
    if not number:
        return np.frombuffer(b"", kind).reshape(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    check(last < len(storage), f"a tensor reaches to number {last} of a storage of {len(storage)}")
    check(number <= len(storage), f"a tensor of {number} numbers on a storage of {len(storage)}")
    strides = tuple(step * kind.itemsize for step in stride)
    return np.ndarray(size, kind, storage.view(np.uint8), offset * kind.itemsize, strides)


def _tensor_of_bytes(storage, offset, size, stride, grad, hooks, kind, *_):
    """Returns a view of a storage of bytes, torch's layout for float8."""
    check(type(kind) is str and kind in FLOAT8, f"numbers of type {kind!r}; expected one of {', '.join(FLOAT8)}")
    window = type(storage) is np.ndarray and storage.dtype == np.uint8 and not storage.flags.owndata
    check(window, "a tensor without a storage of bytes")
    return _tensor(storage.view(FLOAT8[kind]), offset, size, stride)


def _check_shape(shape: object) -> None:
    right = type(shape) is tuple and len(shape) <= 64 and all(type(n) is int and 0 <= n < LONG for n in shape)
    check(right, "a shape, strides or an offset that cannot be")


def _parameter(data, *_):
    check(type(data) is np.ndarray, "a parameter without a tensor")
    return data


def _size(sizes):
    _check_shape(sizes)
    return sizes


def _dict(pairs=()):
    check(type(pairs) in (list, tuple), "a list of pairs is expected")
    return {_key(key): value for key, value in pairs}


def _set(items=()):
    check(type(items) in (list, tuple), "a list of a set's items is expected")
    return {_key(item) for item in items}


def _key(key):
    """Returns a key of a dict.  Tuples are errors, since hashing them visits all of their content."""
    right = type(key) in (str, bytes, float, bool, type(None)) or type(key) is int and abs(key) < KEY
    check(right, f"a key of a dict that is no text or number: {type(key).__name__}")
    return key


def _parameters():
    """Returns a dict in place of a new torch.nn.ParameterDict, which BUILD fills."""
    return {}


def _array():
    raise ValueError("numpy.ndarray is called")


def _blank(kind, shape, _):
    """Returns the empty array at the start of numpy's pickles; BUILD gives it shape and numbers."""
    check(kind is _array and shape == (0,), "an array of another class than numpy's")
    return np.empty(0, np.int8)


def _dtype(code, *_):
    check(type(code) is str and code in NUMBERS, f"numpy type {code!r}; expected one of {', '.join(NUMBERS)}")
    return np.dtype(code)


def _scalar(kind, raw):
    right = isinstance(kind, np.dtype) and type(raw) is bytes and len(raw) == kind.itemsize
    check(right, "a number of numpy's whose bytes are not there")
    return np.frombuffer(raw, kind)[0].item()


def _no_bytes():
    return b""


def _encode(text, encoding):
    """Returns the bytes of Latin-1 text, protocol 2's form of bytes."""
    check(type(text) is str and encoding == "latin1", "bytes that are not Latin-1")
    return text.encode("latin1")


CALLS = {
    "__builtin__ bytes": _no_bytes,  # empty bytes in protocol 2; it encodes others as text
    "__builtin__ set": _set,
    "_codecs encode": _encode,
    "builtins set": _set,
    "collections OrderedDict": _dict,
    "numpy dtype": _dtype,
    "numpy ndarray": _array,
    "numpy._core.multiarray _reconstruct": _blank,
    "numpy._core.multiarray scalar": _scalar,
    "numpy.core.multiarray _reconstruct": _blank,
    "numpy.core.multiarray scalar": _scalar,
    "torch Size": _size,
    "torch._utils _rebuild_parameter": _parameter,
    "torch._utils _rebuild_tensor": _tensor,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_tensor_v3": _tensor_of_bytes,
    "torch.nn.modules.container ParameterDict": _parameters,
}
STORAGES = {
    "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch BoolStorage": np.dtype("bool"),
    "torch ByteStorage": np.dtype("uint8"),
    "torch CharStorage": np.dtype("int8"),
    "torch DoubleStorage": np.dtype("float64"),
    "torch FloatStorage": np.dtype("float32"),
    "torch HalfStorage": np.dtype("float16"),
    "torch IntStorage": np.dtype("int32"),
    "torch LongStorage": np.dtype("int64"),
    "torch ShortStorage": np.dtype("int16"),
    "torch.storage UntypedStorage": np.dtype("uint8"),
}
FLOAT8 = {
    "torch.float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "torch.float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}
# Lightning stores its callbacks' state under their classes; the reader returns only these names.
WORDS = (
    "lightning.pytorch.callbacks.model_checkpoint ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping EarlyStopping",
    "pytorch_lightning.callbacks.lr_monitor LearningRateMonitor",
    "pytorch_lightning.callbacks.model_checkpoint ModelCheckpoint",
    "torch bfloat16",
    "torch float8_e4m3fn",
    "torch float8_e5m2",
    "torch float8_e8m0fnu",
    "torch float16",
    "torch float32",
    "torch float64",
    "torch int64",
)
GLOBALS = {**CALLS, **STORAGES, **{name: name.replace(" ", ".") for name in WORDS}}


# ---- the machine -------------------------------------------------------------------------------


def _run(file: io.BytesIO, storage: Storage | None, size: int) -> Any:
    """Returns the value of the pickle at the file's position and moves the position to its end.

    storage: function (type, key, count) that returns numbers [count], or None if the pickle may not use storages.
    size: bytes of the whole file.
    """
    machine = Machine(storage, REPEATS * size)
    for steps, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        check(steps < STEPS, f"a pickle of more than {STEPS} steps")
        check(opcode.name in STEP, f"the pickle uses {opcode.name}, which no file of weights needs")
        STEP[opcode.name](machine, argument)
        if opcode.name in CONTAINERS:
            machine.spend(sys.getsizeof(machine.stack[-1]))
    value = machine.pop()
    check(not machine.stack and not machine.marks, "the pickle leaves values behind")
    return value


def _push_integer(machine, value):
    check(value.bit_length() <= INTEGER_BITS, f"an integer of {value.bit_length()} bits")
    machine.push(value)


def _mark(machine, _):
    machine.spend(ENTRY)
    machine.marks.append(machine.stack)
    machine.stack = []


def _put(machine, place):
    check(place not in machine.memo, f"the pickle remembers two values as number {place}")
    machine.spend(ENTRY)
    machine.memo[place] = machine.top()


def _get(machine, place):
    check(place in machine.memo, f"the pickle asks for value {place}, which it does not have")
    machine.push(machine.memo[place])


def _tuple_of(count):
    return lambda machine, _: machine.push(tuple([machine.pop() for _ in range(count)][::-1]))


def _items(machine, values):
    check(len(values) % 2 == 0, "a key without a value")
    machine.walk(values[::2])
    return {_key(key): value for key, value in zip(values[::2], values[1::2], strict=True)}


def _append(machine, values):
    held = machine.top(list)
    machine.fill(held, lambda: held.extend(values))


def _set_items(machine, values):
    held = machine.top(dict)
    machine.fill(held, lambda: held.update(_items(machine, values)))


def _add_items(machine, values):
    held = machine.top(set)
    machine.walk(values)
    machine.fill(held, lambda: held.update(map(_key, values)))


def _global(machine, name):
    check(name in GLOBALS, f"{name.replace(' ', '.', 1)!r} is not among the names that a file of weights may use")
    machine.push(GLOBALS[name])


def _stack_global(machine, _):
    name, module = machine.pop(), machine.pop()
    check(type(name) is str and type(module) is str, "a name that is no text")
    _global(machine, f"{module} {name}")


def _reduce(machine, _):
    arguments, function = machine.pop(), machine.pop()
    # The stack never holds functions other than those of CALLS.
    check(type(function) is types.FunctionType, f"the pickle calls a value: {type(function).__name__}")
    check(type(arguments) is tuple, "a call without a tuple of arguments")
    machine.walk(arguments)
    for one in arguments:
        if type(one) in (list, tuple):  # the items of a set or dict, or a shape
            machine.walk(item[0] if type(item) in (list, tuple) and item else item for item in one)
    value = function(*arguments)
    if function in (_tensor, _tensor_of_bytes):
        machine.left -= value.nbytes
        check(machine.left >= 0, f"tensors of more than {REPEATS} times the size of the file")
    machine.spend(sys.getsizeof(value))
    machine.push(value)


def _new(machine, _):
    arguments, kind = machine.pop(), machine.pop()
    check(kind in (_parameters, _dict) and arguments == (), "the pickle makes an object that no file of weights needs")
    machine.spend(sys.getsizeof({}))
    machine.push({})


def _build(machine, _):
    """Fills an array or a ParameterDict; ignores torch's attributes of dicts (_metadata)."""
    state, value = machine.pop(), machine.top()
    if type(value) is dict:
        check(type(state) is dict and type(state.get("_parameters", {})) is dict, "a dict's attributes are no dict")
        added = state.get("_parameters", {})
        machine.walk(added)
        machine.fill(value, lambda: value.update(added))
    elif isinstance(value, np.dtype):
        check(type(state) is tuple and state[1:5] in PLAIN_TYPE, "numpy's numbers are structured or not little-endian")
    else:
        own = type(value) is np.ndarray and value.flags.owndata
        check(own, f"the pickle sets the state of a {type(value).__name__}")
        state = _array_state(*state)
        machine.spend(len(state[-1]))
        value.__setstate__(state)
        value.flags.writeable = False


PLAIN_TYPE = (("<", None, None, None), ("|", None, None, None))  # byte order, sub-array, names, fields


def _array_state(version, shape, kind, fortran, raw) -> Any:
    """Returns the state of a numpy array after checking that it is plain numbers and complete."""
    _check_shape(shape)
    right = version == 1 and isinstance(kind, np.dtype) and type(fortran) is bool and type(raw) is bytes
    check(right and math.prod(shape) * kind.itemsize == len(raw), "an array whose numbers are not there")
    return version, shape, kind, fortran, raw


def _persistent(machine, _):
    """Pushes the storage of ("storage", type, key, device, count of numbers); the older format adds None.

    The older format also has entries ("module", class, source file, source text), for which it pushes the class.
    """
    entry = machine.pop()
    if type(entry) is tuple and len(entry) == 4 and entry[0] == "module" and entry[1] is _parameters:
        return machine.push(_parameters)
    right = type(entry) is tuple and len(entry) >= 5 and entry[0] == "storage" and entry[5:] in ((), (None,))
    check(right and machine.storage, "the pickle asks for something outside it that is no storage")
    _, kind, key, _, count = entry[:5]  # pyright: ignore[reportAssignmentType]  # `right` counts them
    check(isinstance(kind, np.dtype) and type(key) is str, "a storage of unknown type")
    _check_shape((count,))
    machine.push(machine.storage(kind, key, count))


# Steps that create a value whose size does not follow from their argument.
CONTAINERS = ("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "TUPLE1", "TUPLE2", "TUPLE3", "TUPLE", "LIST", "DICT")
STEP = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda machine, _: None),
    **dict.fromkeys(("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"), _push_integer),
    **dict.fromkeys(("FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING"), Machine.push),
    **dict.fromkeys(("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"), Machine.push),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"), Machine.push),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_SET": lambda machine, _: machine.push(set()),
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.take())),
    "LIST": lambda machine, _: machine.push(machine.take()),
    "DICT": lambda machine, _: machine.push(_items(machine, machine.take())),
    "APPEND": lambda machine, _: _append(machine, [machine.pop()]),
    "APPENDS": lambda machine, _: _append(machine, machine.take()),
    "SETITEM": lambda machine, _: _set_items(machine, [machine.pop(), machine.pop()][::-1]),
    "SETITEMS": lambda machine, _: _set_items(machine, machine.take()),
    "ADDITEMS": lambda machine, _: _add_items(machine, machine.take()),
    "MARK": _mark,
    "POP": lambda machine, _: machine.pop(),
    "POP_MARK": lambda machine, _: machine.take(),
    "DUP": lambda machine, _: machine.push(machine.top()),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _put),
    "MEMOIZE": lambda machine, _: _put(machine, len(machine.memo)),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _get),
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _reduce,
    "NEWOBJ": _new,
    "BUILD": _build,
    "BINPERSID": _persistent,
}
