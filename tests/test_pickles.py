"""Files of torch.save are read as torch reads them, and nothing that a file holds ever runs.

Each attack is a whole file with a payload that leaves a mark when it runs; torch's own unpickler is not asked.
"""

import collections
import hashlib
import io
import os
import pathlib
import pickle
import pickletools
import struct
import subprocess
import sys
import textwrap
import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch

from sdjax.formats.storage import archives, pickles, plain_values

P2, STOP = b"\x80\x02", b"."


# ---- what torch wrote --------------------------------------------------------------------------


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3), torch.nn.Linear(3, 2))


def parameters():
    return torch.nn.ParameterDict({"*": torch.nn.Parameter(torch.randn(2, 5))})


DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
SAVED = {
    "state dict": lambda: network().state_dict(),
    "lightning": lambda: {
        "epoch": 1,
        "global_step": 875000,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": network().state_dict(),
        "optimizer_states": [torch.optim.AdamW(network().parameters()).state_dict()],
        "lr_schedulers": [],
    },
    "embedding": lambda: {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": torch.randn(3, 8)},
        "name": "cat",
        "step": 1000,
        "sd_checkpoint": None,
    },
    "first embeddings": lambda: {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": parameters()},
    "hypernetwork": lambda: {
        768: (network().state_dict(), network().state_dict()),
        "layer_structure": [1, 2, 1],
        "is_layer_norm": False,
        "dropout_structure": [0, 0.3, 0],
    },
    "types": lambda: {name: torch.arange(6).reshape(2, 3).to(getattr(torch, name)) for name in DTYPES},
    "strides": lambda: (lambda x: {"all": x, "part": x[1:, ::2], "turned": x.T, "cell": x[2, 3], "none": x[:0]})(
        torch.arange(30.0).reshape(5, 6)
    ),
    "values": lambda: [None, True, -1, 2**70, 1.5, "Ü", b"\xff\0", (1, (2,)), {3}, torch.Size([1, 2]), torch.float16],
    "numpy": lambda: {
        "row": np.arange(6.0).reshape(2, 3),
        "column": np.asfortranarray(np.arange(6, dtype=np.int32).reshape(2, 3)),
        "half": np.ones(3, np.float16),
        "scalar": np.float64(2.5),
        "empty": np.zeros((0, 3), np.float32),
    },
    "ordered": lambda: collections.OrderedDict([("b", 1), ("a", torch.nn.Parameter(torch.ones(2)))]),
}


def same(ours, theirs):
    """Asserts that what was read is what torch was given."""
    if isinstance(theirs, torch.Tensor):
        kind = np.dtype(ml_dtypes.bfloat16) if theirs.dtype == torch.bfloat16 else theirs.detach().numpy().dtype
        assert ours.dtype == kind and ours.shape == tuple(theirs.shape) and not ours.flags.writeable
        np.testing.assert_array_equal(ours.astype(np.float64), theirs.detach().double().numpy())
    elif isinstance(theirs, np.ndarray):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    elif isinstance(theirs, dict | torch.nn.ParameterDict):
        assert type(ours) is dict and list(ours) == list(theirs.keys())
        for key in ours:
            same(ours[key], theirs[key])
    elif isinstance(theirs, list | tuple):
        assert type(ours) is (list if isinstance(theirs, list) else tuple) and len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            same(one, other)
    elif isinstance(theirs, torch.dtype):
        assert ours == str(theirs)
    else:
        assert type(ours) is (float if isinstance(theirs, np.generic) else type(theirs)) and ours == theirs


@pytest.mark.parametrize("archive", [True, False], ids=["archive", "row"])
@pytest.mark.parametrize("name", SAVED)
def test_what_torch_saved_is_read(name, archive, tmp_path):
    value = SAVED[name]()
    torch.save(value, tmp_path / "file", _use_new_zipfile_serialization=archive)
    same(pickles.read(tmp_path / "file"), value)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_protocols(protocol, tmp_path):
    value = SAVED["lightning"]()
    torch.save(value, tmp_path / "file", pickle_protocol=protocol)
    same(pickles.read(tmp_path / "file"), value)


def test_arrays_are_windows_on_the_file(tmp_path):
    """A file of 64 MB, two views of one storage, takes no memory of that size."""
    x = torch.zeros(16 * 2**20)
    torch.save({"a": x, "b": x[8:]}, tmp_path / "file")
    program = f"""
        import resource
        from sdjax.formats.storage import pickles
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        read = pickles.read({str(tmp_path / "file")!r})
        assert read["a"].nbytes == 2**26 and read["b"].shape == (2**24 - 8,)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**14
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)


def test_classes_of_callbacks_are_only_names(tmp_path):
    """Lightning up to 1.4 keeps the state of its callbacks under their classes."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    inner = P2 + b"}c" + name.encode() + b"\nModelCheckpoint\n}s."
    assert pickles.read(archive(tmp_path, inner)) == {f"{name}.ModelCheckpoint": {}}


# ---- attacks -----------------------------------------------------------------------------------


def archive(folder, program, records=(), **options):
    """Writes an archive as torch does, with this pickle and {name: bytes} beside it, and returns its path."""
    path = folder / "attack.pt"
    with zipfile.ZipFile(path, "w", options.pop("compression", zipfile.ZIP_STORED)) as file:
        file.writestr("archive/data.pkl", program)
        for name, content in dict(records).items():
            file.writestr(name, content)
    return path


def row(folder, program, keys=(), numbers=b""):
    """Writes the older container, and returns its path."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    head = [pickle.dumps(value, 2) for value in (pickles.MAGIC, pickles.PROTOCOL, system)]
    (folder / "attack.pt").write_bytes(b"".join([*head, program, pickle.dumps(list(keys), 2), numbers]))
    return folder / "attack.pt"


def text(value):
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def short(value):
    return b"\x8c" + bytes([len(value.encode())]) + value.encode()


def named(module, name):
    """STACK_GLOBAL with both names given."""
    return b"\x80\x04" + short(module) + short(name) + b"\x93"


def call(module, name, argument):
    """GLOBAL, one argument, REDUCE."""
    return P2 + f"c{module}\n{name}\n".encode() + text(argument) + b"\x85R" + STOP


MARK = "touch marked"  # what every payload runs; it would leave this file in the current folder
PYTHON = "open('marked', 'w')"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
FLOATS = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x04tQ"


def tensor(offset, size, stride, storage=FLOATS):
    """A pickle of one tensor on a storage of four numbers."""

    def ints(values):
        return b"(" + b"".join(integer(value) for value in values) + b"t"

    hooks = b"\x89ccollections\nOrderedDict\n)R"
    return P2 + TENSOR + b"(" + storage + integer(offset) + ints(size) + ints(stride) + hooks + b"tR" + STOP


def integer(value):
    raw = pickle.encode_long(value)
    return b"\x8a" + bytes([len(raw)]) + raw if len(raw) < 256 else b"\x8b" + struct.pack("<i", len(raw)) + raw


def nested(depth, opening=b"]", closing=b"a"):
    return P2 + opening * depth + closing * (depth - 1) + STOP


class Evil:
    """An object whose pickle calls os.system."""

    def __reduce__(self):
        return os.system, (MARK,)


class WithState:
    def __init__(self):
        self.x = 1

    def __setstate__(self, state):
        os.system(MARK)


ARRAY = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + b"c_codecs\nencode\n" + text("b")
ARRAY += text("latin1") + b"\x86R\x87R"
OBJECTS = b"cnumpy\ndtype\n" + text("O8") + b"\x89\x88\x87R"
DOUBLES = b"cnumpy\ndtype\n" + text("f8") + b"\x89\x88\x87R"
MORE = b"ccollections\nOrderedDict\n"

# Programs: each a pickle that CPython's unpickler, or a careless one, would follow.
PROGRAMS = {
    # functions by name
    "os.system": call("os", "system", MARK),
    "posix.system": call("posix", "system", MARK),
    "nt.system": call("nt", "system", MARK),
    "builtins.eval": call("builtins", "eval", PYTHON),
    "builtins.exec": call("builtins", "exec", PYTHON),
    "__builtin__.eval of Python 2": call("__builtin__", "eval", PYTHON),
    "subprocess": call("subprocess", "getoutput", MARK),
    "runpy": call("runpy", "_run_code", PYTHON),
    "pip.main, CVE-2025-1716": call("pip", "main", "install evil"),
    "asyncio, unknown to scanners": call("asyncio.unix_events", "_UnixSubprocessTransport._start", MARK),
    "timeit": call("timeit", "timeit", PYTHON),
    "pdb.run": call("pdb", "run", PYTHON),
    "idlelib": call("idlelib.run", "Executive.runcode", PYTHON),
    "torch.load": call("torch", "load", "other.pt"),
    "torch.utils reduce": call("torch.utils.collect_env", "run", MARK),
    "torch._dynamo": call("torch._dynamo.guards", "GuardBuilder.get", PYTHON),
    "numpy.testing": call("numpy.testing._private.utils", "runstring", PYTHON),
    "numpy.load": call("numpy", "load", "other.npy"),
    "pickle.loads": call("pickle", "loads", "cos\nsystem\n."),
    "importlib": call("importlib", "import_module", "antigravity"),
    "webbrowser": call("webbrowser", "open", "http://localhost"),
    "socket": call("socket", "create_connection", "localhost"),
    "open of a file": call("builtins", "open", "/etc/passwd"),
    "shutil.rmtree": call("shutil", "rmtree", "/tmp/x"),
    "code of our own": call("sdjax.formats.storage.files", "locate", "x"),
    "pickled object": pickle.dumps(Evil(), 2),
    "pickled object in a dict": pickle.dumps({"state_dict": {"a": [Evil()]}}, 4),
    "setstate": pickle.dumps(WithState(), 2),
    # other ways to a name
    "STACK_GLOBAL": named("os", "system") + short(MARK) + b"\x85R.",
    "STACK_GLOBAL of joined memos": b"\x80\x04" + short("os") + b"\x94" + short("system") + b"\x940h\x00h\x01\x93.",
    "STACK_GLOBAL of bytes": b"\x80\x04C\x02osC\x06system\x93.",
    "dotted name, protocol 4": named("collections", "OrderedDict.__init__.__globals__") + b".",
    "dotted name to sys": named("collections", "_sys.modules") + b".",
    "name with a space": named("torch._utils _rebuild_tensor_v2", "") + b".",
    "empty module": named("", "collections OrderedDict") + b".",
    "GLOBAL with spaces": P2 + b"ccollections OrderedDict\n\n" + STOP,
    "lookalike letters": named("\u0441ollections", "OrderedDict") + b".",  # Cyrillic
    "full-width letters": named("collections", "\uff2frderedDict") + b".",
    "zero-width letter": named("collections", "Ordered\u200bDict") + b".",
    "NUL in a name": named("collections\0", "OrderedDict") + b".",
    "other case": named("Collections", "ordereddict") + b".",
    "lone surrogate": P2 + text("\ud800") + text("system") + b"\x93.",
    "getattr chain": P2 + b"cbuiltins\ngetattr\ncos\n__dict__\n" + text("system") + b"\x86R.",
    "operator.attrgetter": call("operator", "attrgetter", "system"),
    "functools.partial": call("functools", "partial", MARK),
    "nested reduce": P2 + b"cbuiltins\nmap\ncos\nsystem\n(" + text(MARK) + b"l\x86R.",
    "INST": P2 + b"(" + text(MARK) + b"ios\nsystem\n.",
    "INST of a known name": P2 + b"(icollections\nOrderedDict\n.",
    "OBJ": P2 + b"(cos\nsystem\n" + text(MARK) + b"o.",
    "OBJ of a known name": P2 + b"(ccollections\nOrderedDict\no.",
    "NEWOBJ": P2 + b"csubprocess\nPopen\n" + text(MARK) + b"\x85\x81.",
    "NEWOBJ of numpy.ndarray": P2 + b"cnumpy\nndarray\n(K\x02t\x81.",
    "NEWOBJ_EX": b"\x80\x04csubprocess\nPopen\n" + text(MARK) + b"\x85}\x92.",
    "NEWOBJ_EX of a known name": b"\x80\x04" + MORE + b")}\x92.",
    "EXT1": P2 + b"\x82\x01.",
    "EXT2": P2 + b"\x83\x01\x00.",
    "EXT4": P2 + b"\x84\x01\x00\x00\x00.",
    "PERSID": P2 + b"P0\n.",
    "persistent id, a number": P2 + b"K\x00Q.",
    "persistent id of another kind": P2 + b"(" + text("module") + b"cos\nsystem\n" + text("f") + text("s") + b"tQ.",
    "persistent id, class of another kind": P2 + b"(" + text("module") + MORE + text("f") + text("s") + b"tQ.",
    "storage of a name": P2 + b"(" + text("storage") + MORE + text("0") + text("cpu") + b"K\x04tQ.",
    "storage of a torch.dtype": P2
    + b"("
    + text("storage")
    + b"ctorch\nfloat32\n"
    + text("0")
    + text("cpu")
    + b"K\x04tQ.",
    "storage outside": P2 + FLOATS.replace(text("0"), text("../data.pkl")) + b".",
    "storage with an absolute path": P2 + FLOATS.replace(text("0"), text("/etc/passwd")) + b".",
    "storage by number": P2 + FLOATS.replace(text("0"), b"K\x00") + b".",
    "view of a storage": P2 + FLOATS.replace(b"tQ", b"(" + text("1") + b"K\x00K\x01ttQ") + b".",
    # calls of what is known, in ways that it is not meant for
    "BUILD with state of a class": P2 + MORE + b"}" + text("x") + b"K\x01sb.",
    "BUILD of a list": P2 + b"]}b.",
    "BUILD of a dict with slots": P2 + b"}}}\x86b.",
    "BUILD of a tensor": tensor(0, [4], [1])[:-1] + b"}b.",
    "BUILD with _parameters that are no dict": P2 + MORE + b")R}" + text("_parameters") + b"K\x01sb.",
    "call of text": P2 + text("os.system") + text(MARK) + b"\x85R.",
    "call of a type of numbers": P2 + b"ctorch\nFloatStorage\n" + text(MARK) + b"\x85R.",
    "call of a callback's name": P2 + b"ctorch\nfloat32\n" + text(MARK) + b"\x85R.",
    "call of a dict": P2 + b"}" + text(MARK) + b"\x85R.",
    "call of the array class": P2 + b"cnumpy\nndarray\nK\x02\x85\x85R.",
    "call without a tuple": P2 + MORE + b"]R.",
    "call with too many arguments": P2 + MORE + b"(]]]tR.",
    "encoding that imports": P2 + b"c_codecs\nencode\n" + text("x") + text("rot13") + b"\x86R.",
    "numpy array of objects": P2 + ARRAY + b"(K\x01K\x01\x85" + OBJECTS + b"\x89]Natb.",
    "numpy object dtype": P2 + OBJECTS + b".",
    "numpy scalar of objects": P2 + b"cnumpy.core.multiarray\nscalar\n" + OBJECTS + text("x") + b"\x86R.",
    "numpy array of pickled state": P2 + ARRAY + b"(K\x01K\x01\x85" + DOUBLES + b"\x89" + text("12345678") + b"tb.",
    "numpy array beyond its bytes": P2
    + ARRAY
    + b"(K\x01J\x00\x00\x00\x7f\x85"
    + DOUBLES
    + b"\x89C\x08"
    + bytes(8)
    + b"tb.",
    "numpy array of negative size": P2 + ARRAY + b"(K\x01J\xff\xff\xff\xff\x85" + DOUBLES + b"\x89C\x00tb.",
    "numpy array of another class": P2 + ARRAY.replace(b"cnumpy\nndarray", b"cnumpy\nmatrix") + b".",
    "numpy array with a wrong state": P2 + ARRAY + b"K\x01\x85b.",
    "structured dtype": P2 + DOUBLES + b"(K\x03" + text("<") + b"N(" + text("a") + b"t}NJ\xff\xff\xff\xffK\x00tb.",
    "big-endian dtype": P2 + DOUBLES + b"(K\x03" + text(">") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb.",
    "storage from an array of one's own": P2 + TENSOR + b"(" + ARRAY + b"K\x00)))NtR.",
    # places and sizes
    "negative stride": tensor(0, [4], [-1]),
    "negative offset": tensor(-1, [4], [1]),
    "negative size": tensor(0, [-4], [1]),
    "offset beyond the storage": tensor(4, [1], [1]),
    "stride beyond the storage": tensor(0, [2], [4]),
    "offset and stride beyond the storage": tensor(1, [2, 2], [2, 1]),
    "sizes that overflow": tensor(0, [2**32, 2**32], [1, 1]),
    "huge size": tensor(0, [2**61], [1]),
    "huge tensor of one number": tensor(0, [2**40], [0]),
    "huge offset": tensor(2**63, [1], [1]),
    "huge stride": tensor(0, [2], [2**62]),
    "size of another length": tensor(0, [2, 2], [1]),
    "65 dimensions": tensor(0, [1] * 65, [1] * 65),
    "sizes that are no numbers": tensor(0, [2], [1]).replace(b"(" + integer(2) + b"t", text("2")),
    "tensor on a number": tensor(0, [1], [1], b"K\x01"),
    "tensor on a tuple": tensor(0, [1], [1], b")"),
    "parameter of a text": P2 + b"ctorch._utils\n_rebuild_parameter\n(" + text("x") + b"\x89}tR.",
    "storage of a huge count": tensor(0, [1], [1], FLOATS.replace(b"K\x04", integer(2**61))),
    "storage of a negative count": tensor(0, [1], [1], FLOATS.replace(b"K\x04", integer(-4))),
    "storage of another type": tensor(0, [1], [1], FLOATS.replace(b"FloatStorage", b"DoubleStorage")),
    # bombs
    "deep lists": nested(10**5),
    "deep tuples": P2 + b")" + b"\x85" * 10**5 + b".",
    "deep dicts": P2 + b"}K\x01" * 5000 + b"N" + b"s" * 5000 + b".",
    "deep tuples as a key": P2 + b"})" + b"\x85" * 10**5 + b"Ns.",
    "billion laughs": P2
    + b"]"
    + b"".join(b"q" + bytes([i]) + b"0](h" + bytes([i]) * 1 + (b"h" + bytes([i])) * 9 + b"e" for i in range(40))
    + b".",
    "a list in itself": P2 + b"]q\x00h\x00a.",
    "a dict in itself": P2 + b"}q\x00K\x01h\x00s.",
    "doubled tuples as a key": P2 + b"})" + b"2\x86" * 100 + b"Ns.",
    "a tuple as a key": P2 + b"}K\x01K\x02\x86Ns.",
    "keys of one hash": P2 + b"}(" + integer(2**61) + b"N" + integer(2**61 + 2**61 - 1) + b"Nu.",
    "more steps than any file has": P2 + b"N0" * 500_001 + b"N.",
    "a huge integer": P2 + b"\x8b" + struct.pack("<i", 10**6) + b"\x01" * 10**6 + b".",
    "a huge decimal": P2 + b"I" + b"9" * 10**6 + b"\n.",
    # lengths that are not there
    "LONG4 of a negative length": P2 + b"\x8b\xff\xff\xff\xff.",
    "LONG4 of a huge length": P2 + b"\x8b\xff\xff\xff\x7f.",
    "BINUNICODE8 of a huge length": b"\x80\x04\x8d" + b"\xff" * 8 + b".",
    "BINUNICODE8 of 2**62": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b".",
    "BINBYTES8 of 2**62": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b".",
    "BYTEARRAY8 of 2**62": b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b".",
    "bytes that are no UTF-8": P2 + b"X\x02\0\0\0\xff\xfe.",
    "a name without an end": P2 + b"c" + b"a" * 10**6,
    "out-of-band buffer": b"\x80\x05\x97.",
    "read-only buffer": b"\x80\x05C\x00\x98.",
    # the machine's own rules
    "memo written twice": P2 + b"]q\x00]q\x00a.",
    "known name put in another's place": P2 + b"Nq\x000" + MORE + b"q\x00h\x00)R.",
    "memo never written": P2 + b"h\x07.",
    "memo of a negative number": P2 + b"Ng-1\n.",
    "nothing on the stack": P2 + b"0.",
    "STOP with nothing": P2 + b".",
    "values left behind": P2 + b"K\x01K\x02.",
    "a mark left behind": P2 + b"K\x01(K\x02.",
    "no mark": P2 + b"]e.",
    "a key without a value": P2 + b"}(K\x01u.",
    "append to a number": P2 + b"K\x01K\x02a.",
    "items of a tuple": P2 + b")(K\x01K\x02u.",
    "no end": P2 + b"N",
    "unknown step": P2 + b"\xfe.",
    "a function as the result": P2 + MORE + b".",
    "a function in the result": P2 + b"]" + MORE + b"a.",
    "a type of numbers in the result": P2 + b"ctorch\nFloatStorage\n.",
    "empty": b"",
    "unhashable key": P2 + b"}]Ns.",
    "unhashable item of a set": P2 + b"c__builtin__\nset\n](]e\x85R.",
    "pairs that are none": P2 + MORE + b"](K\x01K\x02e\x85R.",
}
DATA = {"archive/data/0": np.arange(4, dtype=np.float32).tobytes()}


# Why each is refused; those that are not here, for a name.
REASONS = {
    "no text": ["STACK_GLOBAL of bytes"],
    "no file of weights needs": [
        "INST",
        "INST of a known name",
        "OBJ of a known name",
        "NEWOBJ of numpy.ndarray",
        "NEWOBJ_EX of a known name",
        "EXT1",
        "EXT2",
        "EXT4",
        "PERSID",
        "out-of-band buffer",
        "read-only buffer",
    ],
    "outside it that is no storage": [
        "persistent id, a number",
        "persistent id, class of another kind",
        "view of a storage",
    ],
    "storage of unknown type": ["storage of a name", "storage of a torch.dtype", "storage by number"],
    "no record": ["storage outside", "storage with an absolute path"],
    "sets the state of": ["BUILD with state of a class", "BUILD of a list", "BUILD of a tensor"],
    "a dict's attributes": ["BUILD of a dict with slots", "BUILD with _parameters that are no dict"],
    "calls a value": ["call of text", "call of a type of numbers", "call of a callback's name", "call of a dict"],
    "positional": ["call of the array class", "call with too many arguments", "numpy array with a wrong state"],
    "tuple of arguments": ["call without a tuple"],
    "Latin-1": ["encoding that imports"],
    "numpy type 'O8'": ["numpy array of objects", "numpy object dtype", "numpy scalar of objects"],
    "whose numbers are not there": ["numpy array of pickled state", "numpy array beyond its bytes"],
    "strides or an offset": [
        "numpy array of negative size",
        "negative stride",
        "negative offset",
        "negative size",
        "huge offset",
        "huge stride",
        "65 dimensions",
        "sizes that are no numbers",
        "storage of a negative count",
    ],
    "structured or not": ["structured dtype", "big-endian dtype"],
    "tensor without a storage": ["storage from an array of one's own", "tensor on a number", "tensor on a tuple"],
    "reaches to number": [
        "offset beyond the storage",
        "stride beyond the storage",
        "offset and stride beyond the storage",
        "sizes that overflow",
        "huge size",
    ],
    "numbers on a storage": ["huge tensor of one number"],
    "other strides than sizes": ["size of another length"],
    "parameter without": ["parameter of a text"],
    "of 16 bytes for": ["storage of a huge count", "storage of another type"],
    "levels": ["deep lists", "deep tuples", "deep dicts", "a list in itself", "a dict in itself"],
    "no text or number": [
        "deep tuples as a key",
        "doubled tuples as a key",
        "a tuple as a key",
        "keys of one hash",
        "unhashable key",
        "unhashable item of a set",
    ],
    "more than 500000 values": ["billion laughs"],
    "500000 steps": ["more steps than any file has"],
    "integer of": ["a huge integer"],
    "digits": ["a huge decimal"],
    "byte count": ["LONG4 of a negative length", "BINUNICODE8 of a huge length"],
    "not enough data": ["LONG4 of a huge length"],
    "remain": ["BINUNICODE8 of 2**62", "BINBYTES8 of 2**62", "BYTEARRAY8 of 2**62"],
    "decode": ["bytes that are no UTF-8"],
    "newline": ["a name without an end"],
    "two values": ["memo written twice", "known name put in another's place"],
    "does not have": ["memo never written", "memo of a negative number"],
    "empty stack": ["nothing on the stack", "STOP with nothing"],
    "leaves values behind": ["values left behind", "a mark left behind"],
    "no MARK": ["no mark"],
    "without a value": ["a key without a value"],
    "as if it were": ["append to a number", "items of a tuple"],
    "STOP": ["no end", "empty"],
    "unknown": ["unknown step"],
    "the pickle holds a": ["a function as the result", "a function in the result", "a type of numbers in the result"],
    "unpack": ["pairs that are none"],
}
NAME = "is not among the names"


def reason(name, reasons):
    return next((reason for reason, found in reasons.items() if name in found), NAME)


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """An empty current folder; whatever runs, it stays empty."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in ("system", "popen"):
        monkeypatch.setattr(os, name, lambda *_: pytest.fail("something ran"))
    before = set(sys.modules)
    yield tmp_path
    assert list((tmp_path / "here").iterdir()) == []
    assert {"antigravity", "webbrowser", "pdb", "timeit", "idlelib"} & (set(sys.modules) - before) == set()


def refused(path, *words):
    """Asserts that a file is refused in one line of moderate length that names it."""
    with pytest.raises(ValueError) as error:
        pickles.read(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < len(str(path)) + 400, message
    assert message.isprintable() and all(word in message.removeprefix(str(path)) for word in words), message


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_program_runs_in_an_archive(name, watched):
    refused(archive(watched, PROGRAMS[name], DATA), reason(name, REASONS))


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_program_runs_in_a_row(name, watched):
    numbers = struct.pack("<q", 4) + DATA["archive/data/0"]
    refused(row(watched, PROGRAMS[name], ["0"], numbers))


def test_the_tensor_of_the_attacks_is_read_where_it_is_right(tmp_path):
    """Otherwise the attacks on its sizes would show nothing."""
    for path in (
        archive(tmp_path, tensor(1, [1, 2], [7, 2]), DATA),
        row(tmp_path, tensor(1, [1, 2], [7, 2]), ["0"], struct.pack("<q", 4) + DATA["archive/data/0"]),
    ):
        np.testing.assert_array_equal(pickles.read(path), [[1, 3]])
    array = P2 + ARRAY + b"(K\x01K\x01\x85" + DOUBLES + b"\x89C\x08" + struct.pack("<d", 2.5) + b"tb."
    np.testing.assert_array_equal(pickles.read(archive(tmp_path, array)), [2.5])


def test_the_payloads_would_run(tmp_path, monkeypatch):
    """CPython follows these programs: the attacks are real ones."""
    ran = []
    monkeypatch.setattr(os, "system", ran.append)
    monkeypatch.setattr("posix.system", ran.append)
    for name in ("os.system", "posix.system", "STACK_GLOBAL", "INST", "OBJ"):
        pickle.loads(PROGRAMS[name])
    assert ran == [MARK] * 5


def test_names_are_a_fixed_list():
    """Nothing is looked up by a name from a file but in this table, of which no entry comes from another module."""
    for name, value in pickles.GLOBALS.items():
        assert name.isascii() and name.count(" ") == 1
        inert = isinstance(value, str | np.dtype)
        assert inert or (callable(value) and value.__module__ == "sdjax.formats.storage.pickles")
    steps = {opcode.name for opcode in pickletools.opcodes}
    assert set(pickles.STEP) < steps
    assert not {"INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID"} & set(pickles.STEP)


# ---- containers --------------------------------------------------------------------------------


GOOD = tensor(0, [4], [1])


def changed(path, change):
    path.write_bytes(change(path.read_bytes()))
    return path


def directory(raw, offset, layout, value):
    """Returns the archive with a field of the directory's last entry changed."""
    raw, at = bytearray(raw), raw.rindex(b"PK\1\2")
    struct.pack_into(layout, raw, at + offset, value)
    return bytes(raw)


def deflated(folder):
    return archive(folder, GOOD, DATA, compression=zipfile.ZIP_DEFLATED)


def twice(folder):
    path = archive(folder, GOOD, {**DATA, "archive/data/1": b"x"})
    return changed(path, lambda raw: raw.replace(b"archive/data/1", b"archive/data/0"))


def two_programs(folder):
    return archive(folder, GOOD, {**DATA, "evil/data.pkl": PROGRAMS["os.system"]})


def bomb(folder):
    return archive(folder, P2 + text("x" * 2**22) + b".", compression=zipfile.ZIP_DEFLATED)


def big_program(folder):
    with zipfile.ZipFile(folder / "attack.pt", "w") as file, file.open("archive/data.pkl", "w") as record:
        for _ in range(65):
            record.write(bytes(2**20))
    return folder / "attack.pt"


def many_records(folder):
    return changed(archive(folder, GOOD, DATA), lambda raw: raw[:-12] + struct.pack("<H", 3) + raw[-10:])


def zip64(folder, count=2**40):
    """An archive with a second, larger end, which says that there are very many records."""

    def change(raw):
        end = struct.pack("<4sQHHLLQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, 0, 0)
        return raw[:-22] + end + struct.pack("<4sLQL", b"PK\6\7", 0, len(raw) - 22, 1) + raw[-22:]

    return changed(archive(folder, GOOD, DATA), change)


def rename(old, new):
    return lambda folder: changed(archive(folder, GOOD, DATA), lambda raw: raw.replace(old, new))


def cut(size):
    return lambda folder: changed(archive(folder, GOOD, DATA), lambda raw: raw[:size])


def entry(offset, layout, value):
    return lambda folder: changed(archive(folder, GOOD, DATA), lambda raw: directory(raw, offset, layout, value))


def beside(**records):
    return lambda folder: archive(folder, GOOD, {**DATA, **{f"archive/{name}": raw for name, raw in records.items()}})


def slip(name):
    return lambda folder: archive(folder, GOOD, {**DATA, name: b"x"})


def a_row(keys, numbers, program=GOOD):
    return lambda folder: row(folder, program, keys, numbers)


def plain(content):
    def write(folder):
        (folder / "attack.pt").write_bytes(content)
        return folder / "attack.pt"

    return write


NUMBERS = DATA["archive/data/0"]
CONTAINERS = {
    "compressed": deflated,
    "zip bomb": bomb,
    "a name twice": twice,
    "two programs": two_programs,
    "a program of 65 MB": big_program,
    "more records than there are": many_records,
    "2**40 records": zip64,
    "zip slip": slip("archive/../../evil"),
    "absolute path": slip("/etc/evil"),
    "Windows path": slip("archive\\..\\evil"),
    "drive": slip("C:evil"),
    "empty part of a path": slip("archive//evil"),
    "encrypted": entry(8, "<H", 1),
    "compression of an unknown kind": entry(10, "<H", 99),
    "sizes that differ": entry(24, "<L", 8),
    "a record of another size": lambda folder: archive(folder, GOOD, {"archive/data/0": NUMBERS + b"x"}),
    "a record beyond the end": entry(42, "<L", 2**31),
    "a place of another record": entry(42, "<L", 0),
    "extra field beyond the end": entry(30, "<H", 65535),
    "a directory cut in the middle": cut(-30),
    "cut in the numbers": cut(150),
    "nothing but a signature": plain(b"PK\3\4"),
    "an end and nothing else": plain(b"PK\5\6" + bytes(18)),
    "something behind the end": lambda folder: changed(archive(folder, GOOD, DATA), lambda raw: raw + b"x"),
    "program with another checksum": rename(b"cpu", b"gpu"),
    "big-endian": beside(byteorder=b"big"),
    "row: numbers cut off": a_row(["0"], struct.pack("<q", 4) + NUMBERS[:-1]),
    "row: no numbers": a_row(["0"], b""),
    "row: another count": a_row(["0"], struct.pack("<q", 5) + NUMBERS + bytes(4)),
    "row: a negative count": a_row(["0"], struct.pack("<q", -4) + NUMBERS),
    "row: a huge count": a_row(["0"], struct.pack("<q", 2**62) + NUMBERS),
    "row: no such storage": a_row(["1"], struct.pack("<q", 4) + NUMBERS),
    "row: a storage twice": a_row(["0", "0"], (struct.pack("<q", 4) + NUMBERS) * 2),
    "row: keys that are no texts": a_row([0], struct.pack("<q", 4) + NUMBERS),
    "row: two types of one storage": a_row(
        ["0"],
        struct.pack("<q", 4) + NUMBERS,
        P2 + b"(" + FLOATS + FLOATS.replace(b"FloatStorage", b"IntStorage") + b"t.",
    ),
    "row: big-endian": plain(
        b"".join(pickle.dumps(v, 2) for v in (pickles.MAGIC, 1001, {"little_endian": False}, 1, []))
    ),
    "row: another protocol": plain(b"".join(pickle.dumps(v, 2) for v in (pickles.MAGIC, 1002, {}, 1, []))),
    "row: a program in its head": plain(PROGRAMS["os.system"]),
    "row: a program in its second place": plain(pickle.dumps(pickles.MAGIC, 2) + PROGRAMS["os.system"]),
    "row: a program for its keys": lambda folder: changed(
        row(folder, GOOD), lambda raw: raw.removesuffix(pickle.dumps([], 2)) + PROGRAMS["os.system"]
    ),
    "a bare pickle": plain(pickle.dumps({"a": 1}, 2)),
    "empty file": plain(b""),
    "a web page": plain(b"<!DOCTYPE html>\n<html>"),
    "a pointer of git lfs": plain(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
    "a tar file of torch before 0.1.10": plain(b"sys_info\0" + bytes(10240)),
    "a safetensors file": plain(struct.pack("<Q", 2) + b"{}"),
}


DAMAGES = {
    "compressed": ["compressed", "zip bomb", "compression of an unknown kind", "sizes that differ"],
    "twice": ["a name twice"],
    "one is expected": ["two programs", "an end and nothing else"],
    "at most": ["a program of 65 MB", "2**40 records"],
    "unpack": ["more records than there are", "a record beyond the end", "row: no numbers"],
    "a record named": ["zip slip", "absolute path", "Windows path", "drive", "empty part of a path"],
    "encrypted": ["encrypted"],
    "not in its place": ["a place of another record"],
    "damaged": ["extra field beyond the end", "program with another checksum"],
    "cut off": [
        "a directory cut in the middle",
        "cut in the numbers",
        "nothing but a signature",
        "something behind the end",
        "row: numbers cut off",
    ],
    "little-endian": ["big-endian", "row: big-endian"],
    "numbers, not": ["row: another count", "row: a negative count", "row: a huge count"],
    "not those": ["row: no such storage", "row: a storage twice"],
    "list of storages": ["row: keys that are no texts"],
    "two types": ["row: two types of one storage"],
    "another protocol": ["row: another protocol"],
    "is not among the names": [
        "row: a program in its head",
        "row: a program in its second place",
        "row: a program for its keys",
    ],
    "neither": ["a bare pickle"],
    "empty file": ["empty file"],
    "unknown": ["a web page", "a pointer of git lfs", "a safetensors file"],
    "empty stack": ["a tar file of torch before 0.1.10"],
    "of 17 bytes for": ["a record of another size"],
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_damaged_and_crafted_containers(name, watched):
    refused(CONTAINERS[name](watched), reason(name, DAMAGES))


def test_many_tensors_on_one_storage(tmp_path):
    """A short file that would fill the memory as soon as its tensors are used."""
    one, numbers = (
        tensor(0, [4096], [1], FLOATS.replace(b"K\x04", b"M\x00\x10"))[2:-1],
        {"archive/data/0": bytes(16384)},
    )
    assert len(pickles.read(archive(tmp_path, P2 + b"(" + one * 3 + b"t.", numbers))) == 3
    refused(archive(tmp_path, P2 + b"(" + one * 10 + b"t.", numbers), "4 times the size")


def made_often(kind):
    """A pickle of some 200 KB that remembers one value and makes copies of it, 300 MB of them."""
    if kind == "text":
        make = text("a" * 200_000) + b"q\x010" + P2[2:] + b"]("
        return P2 + make + (b"c_codecs\nencode\nh\x01X\x06\x00\x00\x00latin1\x86R") * 1500 + b"e."
    if kind == "array":
        begin = b"B" + struct.pack("<I", 200_000) + b"\0" * 200_000 + b"q\x010]("
        plain = DOUBLES.replace(b"f8", b"u1")
        one = ARRAY + b"(K\x01J" + struct.pack("<i", 200_000) + b"\x85" + plain + b"\x89h\x01tb"
        return P2 + begin + one * 1500 + b"e."
    pairs = b"](" + b"".join(b"J" + struct.pack("<i", i) + b"N\x86" for i in range(20_000)) + b"eq\x010]("
    name = {"dict": b"ccollections\nOrderedDict\n", "set": b"c__builtin__\nset\n"}[kind]
    pairs = pairs.replace(b"N\x86", b"") if kind == "set" else pairs
    return P2 + pairs + (name + b"h\x01\x85R") * 1500 + b"e."


@pytest.mark.parametrize("kind", ["text", "array", "dict", "set"])
def test_copies_of_one_value(kind, tmp_path):
    """What a short file makes of one value often is counted, and not only tensors."""
    refused(archive(tmp_path, made_often(kind)), "more than" if kind == "dict" else "4 times the file's size")
    marks = P2 + b"(" * 900_000 + b"."
    refused(archive(tmp_path, marks), "4 times the file's size")


def test_kinds_of_attack_are_many():
    assert len(PROGRAMS) + len(CONTAINERS) >= 150
    assert len(set(PROGRAMS.values())) == len(PROGRAMS)


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe"])
def test_what_is_no_file(kind, tmp_path):
    path = tmp_path / "attack.pt"
    {"missing": lambda: None, "folder": path.mkdir, "pipe": lambda: os.mkfifo(path)}[kind]()
    refused(path, "no such file")


def test_every_cut_and_every_flipped_byte(tmp_path):
    """A damaged file is an error or still plain values; nothing else comes out, whatever byte is wrong."""
    rng = np.random.default_rng(0)
    for container in (archive(tmp_path, GOOD, DATA), row(tmp_path, GOOD, ["0"], struct.pack("<q", 4) + NUMBERS)):
        raw = container.read_bytes()
        for size in range(0, len(raw), 9):
            container.write_bytes(raw[:size])
            refused(container)
        for place in rng.integers(len(raw), size=500):
            container.write_bytes(raw[:place] + bytes([rng.integers(256)]) + raw[place + 1 :])
            try:
                value = pickles.read(container)
            except ValueError:
                continue
            assert type(value) in plain_values.LEAVES


def test_a_file_that_changes_its_name_is_read_once(tmp_path):
    """What is checked is what is read: the path is opened once, so another file in its place changes nothing."""
    path = archive(tmp_path, GOOD, DATA)
    value = pickles.read(path)
    before = hashlib.sha256(value.tobytes()).hexdigest()
    os.replace(archive(tmp_path / "..", PROGRAMS["os.system"]), path)
    assert hashlib.sha256(value.tobytes()).hexdigest() == before


def test_zip64_archives(tmp_path):
    """Files beyond 4 GB have it; force_zip64 writes the same fields in small ones."""
    with zipfile.ZipFile(tmp_path / "file", "w") as file:
        for name, raw in {"archive/data.pkl": GOOD, **DATA}.items():
            with file.open(name, "w", force_zip64=True) as record:
                record.write(raw)
    np.testing.assert_array_equal(pickles.read(tmp_path / "file"), np.arange(4))
    raw = bytearray((tmp_path / "file").read_bytes())
    entry = b"archive/data/0"
    at = raw.rindex(entry)
    where = struct.unpack_from("<L", raw, at - 4)[0]
    size = len(NUMBERS)
    fields = struct.pack("<HHQQQ", 1, 24, size, size, where)
    struct.pack_into("<LL", raw, at - 26, 0xFFFFFFFF, 0xFFFFFFFF)
    struct.pack_into("<H", raw, at - 16, len(fields))
    struct.pack_into("<L", raw, at - 4, 0xFFFFFFFF)
    end = at + len(entry)
    raw = raw[:end] + fields + raw[end:]
    struct.pack_into("<L", raw, len(raw) - 22 + 12, struct.unpack_from("<L", raw, len(raw) - 10)[0] + len(fields))
    found = archives.records(bytes(raw))
    assert found["archive/data/0"].size == size
    assert bytes(raw[found["archive/data/0"].start :][:size]) == NUMBERS
    assert io.BytesIO(raw).read(2) == b"PK" and pathlib.Path(tmp_path / "file").exists()
