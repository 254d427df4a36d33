"""Weight files: reads safetensors one tensor at a time, writes folders completely or not at all, fetches models.

    weights = open_weights(folder / "unet", "diffusion_pytorch_model")     # one file, or an index and its shards
    weights.shape("conv_in.weight"), weights.read("conv_in.weight")
    with new_folder("model", mark="model_index.json") as temporary:   # "model" changes only if the block succeeds
        write_weights(temporary / "unet", "diffusion_pytorch_model", tensors)

It also reads pickled weights (.bin) without executing code (pickles.py).
Source of the format: safetensors, format description; sharding: diffusers' and transformers' index files.
"""

import contextlib
import ctypes
import errno
import glob
import hashlib
import json
import os
import pathlib
import re
import secrets
import shutil
import socket
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from sdjax.formats.storage import pickles
from sdjax.formats.storage.tensor_file import TensorFile
from sdjax.runtime import room

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
TYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
SHARD_SIZE = 10 * 10**9  # bytes; diffusers' max_shard_size
PICKLED = {"model": "pytorch_model"}  # transformers' stem of pickled files; diffusers' stem is the same as for others
LONGEST = 150  # letters of a name that its temporary name keeps: file systems allow 255 bytes
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


# ---- reading -----------------------------------------------------------------------------------


class Stored(Protocol):
    """Tensors by name, read one at a time: Weights, TensorFile, Arrays, single_file.View."""

    @property
    def path(self) -> str | pathlib.Path: ...

    @property
    def names(self) -> Collection[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> str: ...

    def read(self, name: str) -> np.ndarray: ...


class Weights:
    """The tensors of one checkpoint, in one file or several: {name: TensorFile}.

    path: the file that the caller asked for, for messages.
    """

    def __init__(self, path: pathlib.Path, files: Mapping[str, Any]):
        self.path = path
        self._files = files

    @property
    def names(self) -> Collection[str]:
        """The names of all tensors."""
        return self._files.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor as in the file."""
        return self._files[name].shape(name)

    def dtype(self, name: str) -> str:
        """Returns the type of a tensor in safetensors' notation: "F32", "F16", "BF16", "I64", ..."""
        return self._files[name].dtype(name)

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor as a numpy array, see TensorFile.read."""
        return self._files[name].read(name)


class Arrays:
    """Arrays by name, a Stored."""

    def __init__(self, path: str | pathlib.Path, arrays: Mapping[str, np.ndarray]):
        self.path = path
        self._arrays = arrays

    @property
    def names(self) -> Collection[str]:
        return self._arrays.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._arrays[name].shape

    def dtype(self, name: str) -> str:
        return TYPES.get(self._arrays[name].dtype.name, self._arrays[name].dtype.name)

    def read(self, name: str) -> np.ndarray:
        return self._arrays[name]


def open_weights(folder: str | pathlib.Path, stem: str, variant: str | None = None) -> Weights | Arrays:
    """Returns the Weights of `stem` in a folder: STEM.safetensors, or STEM.safetensors.index.json and its shards.

    Without these, it returns the Arrays of STEM.bin (transformers' pytorch_model.bin) or its shards.
    variant: such as "fp16", for STEM.fp16.safetensors; None takes the plain file, else the fp16 one.
    Raises ValueError naming a file that is missing or damaged, or a pickle that needs anything but plain values.
    """
    folder = pathlib.Path(folder)
    infixes = [f".{variant}"] if variant else ["", ".fp16"]
    for ending, name in (("safetensors", stem), ("bin", PICKLED.get(stem, stem))):
        make: Any = Weights if ending == "safetensors" else Arrays
        read: Any = _tensors if ending == "safetensors" else arrays
        for infix in infixes:
            single, index = folder / f"{name}{infix}.{ending}", folder / f"{name}.{ending}.index{infix}.json"
            if single.is_file():
                return make(single, read(single))
            if index.is_file():
                return make(index, _indexed(index, ending, read))
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    raise ValueError(f"{folder / f'{stem}{infixes[0]}.safetensors'}: no such file")


def arrays(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """Returns {name: array} of a torch.save file with weights by name; ignores its other values.

    Raises ValueError naming a file that is damaged, needs anything but plain values, or has no weights by name.
    """
    value = pickles.read(path)
    if type(value) is not dict:
        raise ValueError(f"{path}: holds no weights by name")
    return {name: array for name, array in value.items() if type(array) is np.ndarray}


def _tensors(path: pathlib.Path) -> dict[str, Any]:
    file = TensorFile(path)
    return dict.fromkeys(file.names, file)


def _indexed(index: pathlib.Path, ending: str, read: Callable[[pathlib.Path], Mapping[str, Any]]) -> dict[str, Any]:
    """Returns {name: entry of read(shard)} for all names in an index."""
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{index}: no weight_map")
    opened = {}
    for name in dict.fromkeys(files.values()):
        if not isinstance(name, str) or not re.fullmatch(rf"[\w.-]+\.{ending}", name):
            raise ValueError(f"{index}: shard {name!r}; the name of a .{ending} file beside the index is expected")
        if not (index.parent / name).is_file():
            raise ValueError(f"{index.parent / name}: no such file; {index.name} names it")
        opened[name] = read(index.parent / name)
    absent = sorted(name for name, file in files.items() if name not in opened[file])
    if absent:
        raise ValueError(f"{index}: {absent[0]} is not in {files[absent[0]]} ({len(absent)} such names)")
    return {name: opened[file][name] for name, file in files.items()}


def read_json(path: str | pathlib.Path) -> dict[str, Any]:
    """Returns the JSON object in a file.  Raises ValueError naming a file that is missing or not a JSON object."""
    path = pathlib.Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a JSON object is expected, not {type(value).__name__}")
    return value


# ---- writing -----------------------------------------------------------------------------------


class Tensor:
    """A tensor to write: its shape, its type (a numpy name such as "float16"), and array(), which computes it."""

    def __init__(self, shape: Iterable[int], dtype: object, array: Callable[[], np.ndarray]):
        self.shape, self.dtype, self.array = tuple(shape), str(dtype), array
        if self.dtype not in TYPES:
            raise ValueError(f"weights of type {self.dtype}: expected one of {', '.join(TYPES)}")

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * {"F64": 8, "F32": 4}.get(TYPES[self.dtype], 2)


def write_safetensors(path: str | pathlib.Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes {name: Tensor} as one safetensors file, one tensor in memory at a time.  metadata: {str: str}.

    Raises ValueError naming a tensor whose array has another shape or type than declared.
    """
    tensors = dict(sorted(tensors.items(), key=lambda item: (-np.dtype(_numpy(item[1].dtype)).itemsize, item[0])))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, tensor in tensors.items():
        ends = [offset, offset + tensor.bytes]
        header[name] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": ends}
        offset = ends[1]
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
    ask_room(path, 8 + len(text) + offset)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors.items():
            array = np.asarray(tensor.array(), order="C")
            if array.shape != tensor.shape or str(array.dtype) != tensor.dtype:
                raise ValueError(
                    f"{name}: {array.dtype} {array.shape} where {tensor.dtype} {tensor.shape} was announced"
                )
            file.write(array.reshape(-1).view(np.uint8).data)


def write_weights(
    folder: str | pathlib.Path, stem: str, tensors: Mapping[str, Tensor], shard_size: int = SHARD_SIZE
) -> None:
    """Writes {name: Tensor} as STEM.safetensors; above `shard_size` bytes as numbered shards and their index."""
    folder = pathlib.Path(folder)
    shards = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(one.bytes for one in shards[-1].values()) + tensor.bytes > shard_size:
            shards.append({})
        shards[-1][name] = tensor
    metadata = {"format": "pt"}  # transformers refuses files without it
    if len(shards) == 1:
        return write_safetensors(folder / f"{stem}.safetensors", tensors, metadata)
    places = {}
    for i, shard in enumerate(shards):
        file = f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / file, shard, metadata)
        places |= dict.fromkeys(shard, file)
    total = sum(tensor.bytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    write_json(folder / f"{stem}.safetensors.index.json", index)


def write_json(path: str | pathlib.Path, value: object) -> None:
    """Writes a JSON file with sorted keys, as Hugging Face's libraries do."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
    pathlib.Path(path).write_text(text + "\n", encoding="utf-8")


@contextlib.contextmanager
def new_file(path: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary path next to `path`; renames it to `path` if the block succeeds, else changes nothing.

    Raises ValueError naming the path if the disk is full or the folder forbidden, and the block's own errors.
    """
    path = pathlib.Path(os.path.realpath(path))
    temporary = _temporary(path)
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        raise _explained(error, path) from error


@contextlib.contextmanager
def new_folder(
    folder: str | pathlib.Path, mark: str, parts: Collection[str] = (), size: int = 0
) -> Iterator[pathlib.Path]:
    """Yields a temporary folder next to `folder`, which replaces it if the block succeeds; else nothing changes.

    An old folder is replaced only if it is empty or has the file `mark`; its entries that are not in `parts` are kept.
    size: bytes to write, checked against the free space.  On Linux one system call swaps the two folders; elsewhere the
    old one is moved away first, so for an instant there is none.
    Raises ValueError if the folder has other content or the disk is too small.
    """
    folder = pathlib.Path(os.path.realpath(folder))
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: a file; a folder is expected")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / mark).is_file():
        raise ValueError(f"{folder}: holds other files and no {mark}; choose a new or empty folder")
    temporary = _temporary(folder)
    check_room(folder, size)
    try:
        temporary.mkdir()
        yield temporary
        if folder.is_dir():
            _keep(folder, temporary, parts)
        for path in (*temporary.rglob("*"), temporary):
            if not path.is_symlink():
                _sync(path)
        _take_place(temporary, folder)
        _sync(folder.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise _explained(error, folder) from error
    shutil.rmtree(temporary, ignore_errors=True)  # now the old folder, after the swap


def check_room(path: str | pathlib.Path, size: int) -> None:
    """Raises NoRoom, a ValueError, if the disk of `path` has fewer than `size` free bytes; its folder must exist."""
    if lack := _lack(path, size):
        raise room.NoRoom(f"{path}: {lack}")


def ask_room(path: str | pathlib.Path, size: int) -> None:
    """Like check_room, for use in new_file and new_folder: raises an OSError, and they add their path to it."""
    if lack := _lack(path, size):
        raise OSError(errno.ENOSPC, lack)


def _lack(path: str | pathlib.Path, size: int) -> str:
    """Returns a message about missing space, "" if `size` bytes fit."""
    free = shutil.disk_usage(pathlib.Path(path).parent).free
    if size <= free:
        return ""
    unit, name = (1e9, "GB") if size >= 1e9 else (1e6, "MB")
    return f"{size / unit:.2f} {name} to write, {free / unit:.2f} {name} free"


def _temporary(path: pathlib.Path) -> pathlib.Path:
    """Returns an unused hidden name next to `path`, with this process's id.

    Removes the temporary files of this machine's dead processes; does not follow links among them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    stem = f".{path.name[:LONGEST]}.saving-"
    for remains in path.parent.glob(f"{glob.escape(stem)}*"):
        if not _running(remains.name.removeprefix(stem)):
            with contextlib.suppress(OSError):  # a leftover does no harm
                shutil.rmtree(remains) if remains.is_dir() and not remains.is_symlink() else remains.unlink()
    return path.parent / f"{stem}{_host()}-{os.getpid()}-{secrets.token_hex(3)}"


def _host() -> str:
    """Returns a short hash of this machine's name, since other machines may write into the same folder."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]


def _running(owner: str) -> bool:
    """Returns whether the process of a name HOST-PID-TOKEN may still run; True for other machines."""
    host, _, rest = owner.partition("-")
    number = rest.partition("-")[0] if rest else host  # older versions wrote only the process id
    if rest and host != _host():
        return True
    try:
        os.kill(int(number), 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


def _keep(old: pathlib.Path, new: pathlib.Path, parts: Collection[str]) -> None:
    """Adds the old folder's entries outside `parts`, such as README.md, to the new folder as hard links."""

    def link(source, destination):
        try:
            os.link(source, destination)
        except OSError:
            shutil.copy2(source, destination)

    for entry in old.iterdir():
        if entry.name not in parts and not (new / entry.name).exists():
            if entry.is_dir() and not entry.is_symlink():
                shutil.copytree(entry, new / entry.name, copy_function=link, symlinks=True)
            else:
                link(entry, new / entry.name)


def _take_place(temporary: pathlib.Path, folder: pathlib.Path) -> None:
    if not folder.exists():
        return os.rename(temporary, folder)
    swap = getattr(ctypes.CDLL(None), "renameat2", None)
    if swap and swap(AT_FDCWD, os.fsencode(temporary), AT_FDCWD, os.fsencode(folder), RENAME_EXCHANGE) == 0:
        return
    old = folder.parent / f".{folder.name}.old-{os.getpid()}"
    os.rename(folder, old)
    os.rename(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explained(error: BaseException, path: pathlib.Path) -> BaseException:
    """Returns the error to raise; for a full disk or forbidden folder, one line that names the destination."""
    return room.explained(error, path, "what was there before is unchanged")


def _numpy(name: str) -> np.dtype:
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


# ---- hub ---------------------------------------------------------------------------------------


def locate(
    source: str | pathlib.Path, patterns: Iterable[list[str]], needed: Callable[[pathlib.Path], bool]
) -> pathlib.Path:
    """Returns the local folder of a source: a folder, or a hub id "owner/name", fetched into the hub's cache.

    patterns: lists of file patterns; each next list is fetched only while needed(folder) is false.  This avoids a
    second copy of the weights in another type.
    huggingface_hub's HF_ENDPOINT sets the hub's address; with HF_HUB_OFFLINE=1 only its cache is used.
    Raises ValueError naming a source that is neither.
    """
    if os.path.isdir(source):
        return pathlib.Path(source)
    if os.path.exists(source):
        raise ValueError(f"{source}: a file; a model folder is expected")
    if not HUB_ID.fullmatch(str(source)):
        raise ValueError(f"model {str(source)!r}: no such folder")
    import huggingface_hub

    wanted, folder = [], pathlib.Path(source)
    for more in patterns:
        wanted += more
        try:
            folder = pathlib.Path(huggingface_hub.snapshot_download(str(source), allow_patterns=wanted))
        except Exception as error:  # many kinds: HTTP, connection, gated, cache
            reason = str(error).strip().splitlines()
            reason = reason[0] if reason else type(error).__name__
            raise ValueError(f"model {str(source)!r}: no such folder, and not from the hub: {reason}") from None
        if needed(folder):
            break
    return folder
