"""The programs that make pictures: read flags, write pictures with records, print errors in one line.

sys.exit(main("text2img", __doc__))
"""

import contextlib
import dataclasses
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sdjax.formats.storage import files
from sdjax.runtime import locks, signals
from sdjax.sampling.fields import acting, fields, make
from sdjax.sampling.settings import SEEDED, TASKS, Interpolate
from sdjax.service import flags, remade
from sdjax.service.request import Request, grouped, several
from sdjax.settings import SettingError

USUAL = {"grammar": "a1111"}  # defaults of the programs that differ from the declared ones
FORMATS = ("png", "jpg", "webp")


def usual(task: str) -> dict[str, Any]:
    """Returns {name: value} of a program's defaults that differ from the declared ones; none for "interpolate"."""
    return {} if TASKS[task] is Interpolate else dict(USUAL)


def parser(task: str, doc: str | None, prog: str | None = None) -> flags.Parser:
    """Returns the command line's parser of a task's program; doc: its description.  prog: its name in the usage."""
    made = flags.Parser(doc, prog=prog)
    made.add_argument(
        "--from-image", metavar="FILE", help="use the settings recorded in a picture; flags override them"
    )
    flags.add(made, [TASKS[task]], usual(task))
    add = made.add_argument_group("program").add_argument
    if TASKS[task] is Interpolate:
        add("--milliseconds", type=int, default=100, help="duration of a frame in moving.webp; default: 100")
    else:
        add("--count", type=int, default=1, help="pictures per prompt; default: 1")
    rows = 4 if TASKS[task] is Interpolate else 8
    add("--batch", type=int, default=rows, help=f"pictures computed at once; default: {rows}")
    add_places(add, task)
    return made


def add_places(add: Any, task: str) -> None:
    """Adds the options for the adapters' folder and the output."""
    add(
        "--adapters",
        default="adapters",
        help="folder of the adapters that prompts name, as <lora:NAME:0.8>; default: adapters",
    )
    add("--format", default="png", choices=FORMATS, help="file format of the pictures; default: png")
    add("--public", action="store_true", help="leave prompts, names and hashes out of the records")
    add("--out", default=f"outputs/{task}", help=f"output folder; default: outputs/{task}")


@contextlib.contextmanager
def one_line(exits: int = 1) -> Iterator[None]:
    """Exits with one line on stderr if the block raises an error that input can cause; names settings as flags."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        said = error.line(flags.flag) if isinstance(error, SettingError) else str(error)
        print(f"error: {next(iter(said.splitlines()), type(error).__name__)}", file=sys.stderr)
        raise SystemExit(exits) from None


def main(task: str, doc: str | None, arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Runs a task's program; returns the exit status.  doc: its description.  prog: its name in the usage."""
    given = vars(parser(task, doc, prog).parse_args(arguments))
    return signals.ended(lambda: _main(task, given), "pictures that were written stay")


def _main(task: str, given: dict[str, Any]) -> int:
    """Runs a task for a command line; returns the exit status."""
    begin = time.monotonic()
    try:
        with one_line():
            paths = run(task, given)
    except SystemExit as end:
        return end.code  # pyright: ignore[reportReturnType]  # one_line ends with a number
    print(f"{len(paths)} pictures in {time.monotonic() - begin:.1f} s: {paths[0].parent}")
    return 0


def run(task: str, given: dict[str, Any], made_by: Any = None) -> list[Path]:
    """Writes the pictures of a command line and returns their paths; given: {option: value}.

    made_by: the Maker to use; None makes one.
    """
    from sdjax.runtime import accelerator, compile_cache
    from sdjax.service import maker

    program = {name: given.pop(name) for name in list(given) if name not in fields(TASKS[task])}
    for name in ("count", "batch", "milliseconds"):
        if program.get(name, 1) < 1:
            raise SettingError(name, program[name], "a whole number, 1 or more")
    source = program["from_image"]
    requests = asked(task, given, program.get("count", 1), source)
    compile_cache.keep()
    accelerator.check()
    made_by, paths = made_by or maker.Maker(program["adapters"]), []
    groups = list(grouped(requests))
    made_by.expect(requests)
    notes = [note for group in groups for note in made_by.notes(group)]
    if source:
        notes += remade.differences(source, made_by.record(requests[0], (1, 1)))
    for note in dict.fromkeys(notes):
        print(f"note: {note}", file=sys.stderr)
    for group in groups:
        most = min(program["batch"], len(group))
        for first in range(0, len(group), most):
            some = group[first : first + most]
            filled = [*some, *[some[-1]] * (most - len(some))]
            made = made_by.make(filled, batch=program["batch"], progress=True)
            paths += _written(made_by, some, made, program)
    return paths


def asked(task: str, given: dict[str, Any], count: int, source: str | None = None) -> list[Request]:
    """Returns the requests of a command line; source: a picture whose settings apply unless flags override them."""
    values = usual(task) | (remade.values(source, task) if source else {}) | given
    if values.get("model", "") is None:
        raise ValueError(f"--from-image {source}: made with another model than the built-in ones; add --model")
    prompts = values.pop("prompt", None)
    prompts = [prompts] if prompts is None or isinstance(prompts, str) else prompts
    prompts = [prompts] if TASKS[task] is Interpolate and prompts[0] is not None else prompts
    made = [make(TASKS[task], values | {"prompt": prompt}, text=True) for prompt in prompts]
    first = made[0].drawn()
    drawn = {name: getattr(first, name) for name in SEEDED}
    for name, value in acting(first).items():
        if name in SEEDED and value != getattr(made[0], name):
            print(f"{flags.flag(name)} {value}")
    return several([dataclasses.replace(one, **drawn) for one in made], count)


def _written(made_by: Any, some: Sequence[Request], made: Any, program: dict[str, Any]) -> list[Path]:
    """Writes pictures under the next free numbers, and the animation of frames; returns their paths."""
    out = Path(program["out"])
    out.mkdir(parents=True, exist_ok=True)
    with locks.turn(out):  # one program at a time takes numbers
        return _numbered(made_by, some, made, program, out)


def _numbered(made_by: Any, some: Sequence[Request], made: Any, program: dict[str, Any], out: Path) -> list[Path]:
    """Writes pictures under the next free numbers; see _written."""
    from sdjax.service import records

    private, paths = not program["public"], []
    first, way = _next_number(out), isinstance(some[0].settings, Interpolate)
    for i, picture in enumerate(made if way else made[: len(some)]):
        request = some[0] if way else some[i]
        more = {"Frame": f"{i + 1}/{len(made)}"} if way else {}
        name = f"{first + i:05d}" if way else f"{first + i:05d}{request.settings.ending}"
        paths.append(out / f"{name}.{program['format']}")
        record = made_by.record(request, picture.shape[:2], private, **more)
        records.save(paths[-1], picture, record)
    if way:
        _moving(made, out / ("moving.webp" if first == 0 else f"moving-{first:05d}.webp"), program["milliseconds"])
    return paths


def _next_number(out: Path) -> int:
    """Returns 1 + the highest number at the start of a file's name in the folder."""
    numbers = [re.match(r"([0-9]{5,18})[-.]", path.name) for path in out.glob("*")]
    return max((int(found[1]) for found in numbers if found), default=-1) + 1


def _moving(pictures: Any, path: Path, milliseconds: int) -> None:
    from PIL import Image

    first, *others = map(Image.fromarray, pictures)
    with files.new_file(path) as temporary:
        files.ask_room(temporary, sum(picture.nbytes for picture in pictures))
        first.save(temporary, "WEBP", save_all=True, append_images=others, duration=milliseconds, loop=0)
