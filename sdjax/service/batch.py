"""Makes the pictures of a list and resumes after any interruption.

Each picture is NAME.png with its settings inside.  NAME.json is written last and marks it as done: its `made_from`
hashes everything that the picture depends on.  Failed rows are in errors.jsonl.
"""

import contextlib
import functools
import hashlib
import json
import re
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from sdjax.formats.storage import files
from sdjax.images import grid, reading
from sdjax.runtime import accelerator, compile_cache, locks, processes, room, signals
from sdjax.sampling import inpainting, latents
from sdjax.sampling.fields import acting
from sdjax.sampling.settings import TASKS
from sdjax.service import flags, lists, maker, programs, records
from sdjax.service.request import Request, grouped, named_files
from sdjax.settings import SettingError

ROWS = [task for name, task in TASKS.items() if name != "interpolate"]


@dataclass(frozen=True)
class Folder:
    """A folder for the pictures of requests, and the Maker that draws them.

    format: png, jpg or webp.  public: leave prompts and file names out of the records.
    """

    maker: maker.Maker
    out: Path
    format: str = "png"
    public: bool = False

    def path(self, request: Request) -> Path:
        """Returns the file of a picture."""
        return self.out / f"{request.name}.{self.format}"

    def key(self, request: Request) -> str:
        """Returns a hash of everything that a picture's files depend on."""
        made = {name: str(value) for name, value in acting(request.settings).items()}
        given = {name: _read_or_none(_digest, request, file) for name, file in named_files(request).items()}
        about = [request.name, request.row, self.public, made, given]
        about += [_weights(self.maker, request), self.maker.hashes(request)]
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()

    def kind(self, request: Request) -> Any:
        """Returns what pictures of one call share beside their settings: sizes of their files, sometimes the mask."""
        made, given = request.settings, named_files(request)
        around = inpainting.cropped(made)
        kept = around or not latents.sized(made)
        sizes = [_read_or_none(_size, request, file) for file in given.values()] if kept else []
        return sizes, _read_or_none(_digest, request, given["mask"]) if around else None

    def done(self, request: Request) -> bool:
        """Returns whether a picture exists that this model made from these settings."""
        found = _made_from(self.out / f"{request.name}.json")
        return found is not None and found == self.key(request) and self.path(request).is_file()

    def in_the_way(self, request: Request) -> str | None:
        """Returns an error if another program wrote the file at a picture's path, else None."""
        path, beside = self.path(request), self.out / f"{request.name}.json"
        ours = records.own(path) if path.exists() else not beside.exists() or _made_from(beside) is not None
        there = path if path.exists() else beside
        return None if ours else f"name={request.name!r}: {there} was not written by this program; choose another name"

    def make(self, some: Sequence[Request], lacking: Sequence[Request], count: int) -> list[Any]:
        """Makes the pictures of one call and writes the missing ones; returns {"row", "name", "error"} of failures.

        count: the batch size; the last request fills the rest, so a smaller remainder compiles nothing.
        If the call fails, each missing picture is tried alone, which needs the least memory.
        """
        keys = [self.key(one) for one in some]
        images, error = _tried(self.maker.make, [*some, *[some[-1]] * (count - len(some))])
        if images is None and count == 1:
            return [{"row": some[0].row, "name": some[0].name, "error": error}]
        if images is None:
            return [found for one in lacking for found in self.make([one], [one], 1)]
        failed = []
        for key, image, one in zip(keys, images, some, strict=False):
            error = _tried(self.write, one, key, image)[1] if one in lacking else None
            failed += [{"row": one.row, "name": one.name, "error": error}] if error else []
        return failed

    def write(self, request: Request, key: str, image: np.ndarray) -> None:
        """Writes a picture and its record."""
        record = self.maker.record(request, image.shape[:2], private=not self.public)
        records.save(self.path(request), image, record, beside=False)
        about = {"name": request.name, "row": request.row, "made_from": key}
        with files.new_file(self.out / f"{request.name}.json") as temporary:
            temporary.write_text(json.dumps({**about, "record": json.loads(records.to_json(record))}, indent=1))


def run(
    folder: Folder,
    jobs: str | Path,
    usual: dict[str, Any],
    batch: int = 8,
    part: tuple[int, int] = (0, 1),
    plot: str = "",
) -> tuple[int, int, int]:
    """Makes the missing pictures; returns (pictures made, rows failed, pictures that existed).

    usual: settings for rows that omit them.  part: (0, 4) is the first of four parts of the list.
    plot: "ACROSS,DOWN", two fields for a sheet of all pictures, plot.png.
    Raises ValueError before the first picture if the list or folder cannot be used, NoRoom for a full disk.  Finished
    pictures stay, and the next call makes the rest.
    """
    if batch < 1:
        raise SettingError("batch", batch, "a whole number, 1 or more")
    axes = _axes(plot) if plot else ()
    with _held(folder.out, part):
        return _run(folder, jobs, usual, batch, part, axes)


@contextlib.contextmanager
def _held(out: Path, part: tuple[int, int]) -> Iterator[None]:
    """Locks a folder against other processes that make the same part, or count the parts differently."""
    number, count = part
    with locks.held(out, file=f"part-{number}-{count}.lock"):
        for other in out.glob("part-*-*.lock"):
            if not other.stem.endswith(f"-{count}") and locks.busy(other):
                raise SettingError("part", f"{number}/{count}", "another folder", f"another process has {other}")
        yield


def _run(
    folder: Folder, jobs: str | Path, usual: dict[str, Any], batch: int, part: tuple[int, int], axes: Sequence[str]
) -> tuple[int, int, int]:
    """Makes the missing pictures of a locked folder; see run."""
    requests, errors = lists.read(jobs, usual, functools.cache(lambda: _word(folder.out)))
    folder.out.mkdir(parents=True, exist_ok=True)
    folder.maker.expect(requests)
    mine = requests[part[0] :: part[1]]
    missing = {one.name for one in mine if not folder.done(one)}
    kept, made, groups = len(mine) - len(missing), 0, list(grouped(mine, folder.kind))
    others = {one.name: folder.in_the_way(one) for one in mine if one.name in missing}
    errors += [{"row": one.row, "name": one.name, "error": others[one.name]} for one in mine if others.get(one.name)]
    missing -= {name for name, error in others.items() if error}
    most = min(batch, max(map(len, groups), default=1))  # one shape, no larger than of use
    with tqdm(total=len(missing), desc="pictures", unit="picture", dynamic_ncols=True, smoothing=0.1) as bar:
        for group in groups:
            for first in range(0, len(group), most):  # of all, made or not: the same rows meet at every start
                some = group[first : first + most]
                lacking = [one for one in some if one.name in missing]
                if lacking:
                    try:
                        found = folder.make(some, lacking, most)
                    except room.NoRoom as error:
                        _report(folder.out, part, errors)
                        raise room.NoRoom(f"{error}; {made} pictures made; start again to go on") from error
                    except KeyboardInterrupt:
                        _report(folder.out, part, errors)
                        raise KeyboardInterrupt(f"{made} pictures made") from None
                    errors += found
                    made += len(lacking) - len(found)
                    bar.update(len(lacking))
    _report(folder.out, part, errors)
    if axes:
        _plot(folder, requests, axes)
    return made, len(errors), kept


def parser(doc: str | None, prog: str | None = None) -> flags.Parser:
    """Returns the command line's parser; doc: the program's description.  prog: its name in the usage."""
    made = flags.Parser(doc, "%(prog)s LIST [options]", prog=prog)
    flags.add(made, ROWS, programs.USUAL, lists=True)
    add = made.add_argument_group("program").add_argument
    add(
        "jobs",
        metavar="LIST",
        help="a .jsonl, .csv or .parquet file; a row is a picture, with fields such as prompt, seed and name",
    )
    add("--batch", type=int, default=8, help="pictures computed at once; default: 8")
    add(
        "--part",
        help="part of the list to make, such as 0/4; default: this process's part if a launcher started several",
    )
    add("--plot", default="", metavar="ACROSS,DOWN", help="also draw plot.png, a sheet of pictures over two fields")
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help="fill a field that rows omit; repeatable")
    programs.add_places(add, "batch")
    return made


def main(doc: str | None, arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Makes the pictures of a list; returns 0, 1 if rows failed, 2 if it could not begin, 3 for a full disk.

    130 after Ctrl-C and 143 after SIGTERM; finished pictures stay.
    """
    given = vars(parser(doc, prog).parse_args(arguments))
    return signals.ended(lambda: _main(given), "start again to go on")


def _main(given: dict[str, Any]) -> int:
    """Makes the pictures of a list for a command line; see main."""
    usual = programs.USUAL | {name: given.pop(name) for name in list(given) if name in lists.KNOWN}
    usual = {name: tuple(value) if isinstance(value, list) else value for name, value in usual.items()}
    try:
        with programs.one_line(exits=2):
            for text in given["set"]:
                name, equals, value = text.partition("=")
                if not equals:
                    raise SettingError("set", text, "FIELD=VALUE")
                usual[name] = value
            compile_cache.keep()
            where = part(given["part"])
            accelerator.check()
            folder = Folder(maker.Maker(given["adapters"]), Path(given["out"]), given["format"], given["public"])
            with _stops():
                made, failed, kept = run(folder, given["jobs"], usual, given["batch"], where, given["plot"])
    except SystemExit as end:
        return end.code  # pyright: ignore[reportReturnType]  # one_line ends with a number
    print(f"{made} pictures made, {kept} already existed, {failed} rows failed: {folder.out}")
    return int(failed > 0)


@contextlib.contextmanager
def _stops() -> Iterator[None]:
    """Exits with 3 if the disk is full."""
    try:
        yield
    except room.NoRoom:
        with programs.one_line(exits=3):
            raise


def part(text: str | None) -> tuple[int, int]:
    """Returns (0, 4) for "0/4"; for "" this process's index and the number of processes that a launcher started."""
    if text is None:
        import jax

        processes.join()
        return jax.process_index(), jax.process_count()
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not int(found[1]) < int(found[2]):
        raise SettingError("part", text, "INDEX/COUNT, 0/4 to 3/4")
    return int(found[1]), int(found[2])


def line(error: BaseException) -> str:
    """Returns an error in one line, with its class if it is neither ValueError nor OSError."""
    first = next(iter(str(error).splitlines()), "")
    kind = "" if first and isinstance(error, (ValueError, OSError)) else type(error).__name__
    return ": ".join(filter(None, (kind, first)))


def _tried(function: Callable[..., Any], *arguments: Any, **more: Any) -> tuple[Any, str | None]:
    """Returns (the function's result, None), or (None, its error in one line), so that no row ends the run."""
    try:
        return function(*arguments, **more), None
    except room.NoRoom:
        raise
    except Exception as error:  # of Pillow also SyntaxError, of JAX its own where memory is full
        return None, line(error)  # the error itself would keep arrays alive


def _made_from(path):
    """Returns `made_from` of the JSON beside a picture; None for a file of another program."""
    try:
        return json.loads(path.read_text())["made_from"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _word(out):
    """Returns a folder's random word, which fixes the seeds drawn for -1, so that every start draws the same."""
    path = out / "seeds.txt"
    out.mkdir(parents=True, exist_ok=True)
    with locks.turn(out):
        if not path.exists():
            with files.new_file(path) as temporary:
                temporary.write_text(secrets.token_hex(16))
    word = path.read_text()
    if not word:
        raise OSError(f"{path}: the file is empty; remove it and start again")
    return word


def _weights(made_by, request):
    sd, key = made_by.base(request)
    return made_by.held.get(("digest", key), lambda: maker.weights(sd))


def _read_or_none(read, request, file):
    """Returns `read` of a file in the list's folder; None if that fails, since the row reports the error later."""
    try:
        path = request.file(file)
        state = path.stat()
        return read(path, state.st_size, state.st_mtime_ns)
    except Exception:
        return None


@functools.lru_cache(maxsize=100_000)
def _digest(path, size, changed):
    """Returns a hash of a file's bytes, cached by size and time."""
    return reading.digest([reading.Item(path)])


@functools.lru_cache(maxsize=100_000)
def _size(path, size, changed):
    """Returns (height, width) of an upright picture; reads the header only."""
    return reading.shape(path)


def _report(out, part, errors):
    """Writes the failed rows, one JSON object a line; removes the file if none failed."""
    path = out / ("errors.jsonl" if part[1] == 1 else f"errors-{part[0]}-{part[1]}.jsonl")
    for error in errors:
        print(f"row {error['row']}: {error['error']}", file=sys.stderr)
    if errors:
        with contextlib.suppress(room.NoRoom), files.new_file(path) as temporary:  # they are on the terminal too
            temporary.write_text("".join(json.dumps(error) + "\n" for error in errors))
    else:
        path.unlink(missing_ok=True)


def _axes(plot):
    axes = plot.split(",")
    if len(axes) != 2 or not set(axes) <= set(lists.KNOWN):
        raise SettingError("plot", plot, f"two fields, of {', '.join(lists.KNOWN)}")
    return axes


def _plot(folder, requests, axes):
    """Writes plot.png, a sheet of the pictures whose columns and rows are the values of two fields."""
    across, down = axes
    found = {}
    for request in requests:
        path = folder.path(request)
        place = tuple(str(getattr(request.settings, axis, "")) for axis in (down, across))
        if path.is_file() and place not in found:
            found[place] = np.asarray(Image.open(path))
    rows, columns = (list(dict.fromkeys(place[i] for place in found)) for i in (0, 1))
    sheet = [[found.get((row, column)) for column in columns] for row in rows]
    left, above = ([f"{axis} {value}" for value in values] for axis, values in ((down, rows), (across, columns)))
    made = grid.sheet(sheet, left, above)
    with files.new_file(folder.out / "plot.png") as temporary:
        files.ask_room(temporary, made.nbytes)
        Image.fromarray(made).save(temporary, "PNG")
