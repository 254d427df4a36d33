"""Training jobs: a recipe of configs/ with a request's settings, in its own process and folder.

    order = order_of(library, {"recipe": "textual_inversion", "data": {"set": KEY}, "settings": {"steps": 500}})

The run's folder is place/runs/KEY.  A request gives a recipe's name, a model's name in the library, uploaded pictures
or a folder in the server's data folder, and plain values; never a path.
"""

import ast
import contextlib
import json
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sdjax import conditions
from sdjax.formats.adapters import adapter_file, attach, kinds
from sdjax.formats.storage import files
from sdjax.images import reading
from sdjax.service.library import Library, known
from sdjax.service.place import Place
from sdjax.service.queue import DONE, FAILED, STOPPED, STOPS, Job, Queue
from sdjax.settings import UNSAID, SettingError, prefixed, shown
from sdjax.training import asked, recipes

EVERY = 0.3  # seconds between reads of a run's metrics
OWN = (
    "out",
    "model",
    "init",
    "vae",
    "tokenizer",
    "vision",
    "perceptual",
    "save_model_as",
    "wandb",
    "data.path",
    "data.cache",
    "parallel",
    "sharding",
)  # settings that requests may not set
PLACES = ("path", "cache", "index", "condition_folder", "prompts_file")  # last parts of the names of such settings
NAME = re.compile(r"[a-zA-Z_]\w*(\.\w+)*")
SUBJECT = re.compile(r"[\w][\w -]{0,60}")
TAIL = 1 << 16  # bytes read at a file's end
ORDERS = {"sample": asked.SAMPLE, "save": asked.SAVE}  # files that a run watches for


def order_of(library: Library, body: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """Returns (the order of a training job, its steps).

    body: {"recipe", "data": {"set": key} or {"folder": name} or {"drawn": "pocketland"}, "model", "init": names in the
    library, "settings": {"optim.lr": 1e-4}, "name": the run's name}.
    Raises SettingError or ValueError in one line for an invalid body.
    """
    known = {"recipe", "data", "model", "init", "settings", "name"}
    for name in body.keys() - known:
        raise SettingError(name, UNSAID, f"one of {', '.join(sorted(known))}", "unknown")
    order = {name: body[name] for name in known & body.keys() if body[name] is not None}
    name = order.get("name", "")
    if not isinstance(name, str) or name and not SUBJECT.fullmatch(name):
        raise SettingError("name", name, "letters, digits, '-' and spaces, at most 60")
    return order, int(_loaded(library, order, "0" * 32).steps)


def _loaded(library: Library, order: Mapping[str, Any], key: str) -> Any:
    """Returns the settings of the run of an order."""
    from sdjax.settings import load

    recipe, items = overrides(library, order)
    made = load(recipe, [f"out={library.place.run(key)}", *items])
    if "data.condition" in order.get("settings", {}) and made.data.condition:
        with prefixed("data"):
            conditions.of(made.data.condition, public=True)
    return made


def overrides(library: Library, order: Mapping[str, Any]) -> tuple[Path, list[str]]:
    """Returns (the recipe, its overrides a.b=value) of an order, but for the folder of the run."""
    recipe, there = order.get("recipe"), recipes.known()
    if recipe not in there:
        raise SettingError("recipe", recipe, f"one of {', '.join(there)}")
    items = _pictures(library.place, order.get("data"))
    for name in ("model", "init"):
        if order.get(name) is not None:
            items.append(f"{name}={_named(library, name, order[name])}")
    settings = order.get("settings", {})
    if not isinstance(settings, dict):
        raise SettingError("settings", settings, "an object {name: plain value}")
    for name, value in settings.items():
        if not may(name):
            raise SettingError(name, value, "a setting of the recipe that names no file")
        items.append(f"{name}={_plain(name, value)}")
    return there[recipe], items


def may(name: str) -> bool:
    """Returns whether a request may give a setting: not the server's own, and not a path."""
    place = name in OWN or name.startswith("data.source") or name.rpartition(".")[2] in PLACES
    return not place and NAME.fullmatch(name) is not None


def _plain(name: str, value: Any) -> Any:
    """Returns a plain value.  Raises SettingError for a path or another type."""
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, (str, int, float, bool)):
            raise SettingError(name, value, "a number, a text, or a list of them")
        for text in filter(None, _texts(item)):
            if re.search(r"[/\\\0\n]", text) or text.startswith(("~", ".")) or os.path.exists(text[:200]):
                raise SettingError(name, value, "a value that is not a path")
    return tuple(value) if isinstance(value, list) else value


def _texts(value: Any) -> Iterator[str]:
    """Yields the texts in a value, also those that `load` reads in it: "x" in "'x'" and in "('x', 1)"."""
    if isinstance(value, str):
        yield value
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            yield from _texts(ast.literal_eval(value))
    elif isinstance(value, dict):
        yield from _texts([*value, *value.values()])
    elif isinstance(value, (list, tuple, set)):
        for one in value:
            yield from _texts(one)


def _pictures(place: Place, data: Any) -> list[str]:
    """Returns the override that names a run's pictures."""
    if data is None:
        return []
    (kind, name), *others = data.items() if isinstance(data, dict) and data else [(None, None)]
    if others or not isinstance(name, str):
        raise SettingError("data", data, '{"set": key}, {"folder": name} or {"drawn": "pocketland"}')
    if kind == "drawn" and name == "pocketland":
        return ["data.path=pocketland"]
    there = {}
    if kind == "set":
        there = {path.name: path for path in (place.root / "sets").iterdir()}
    elif kind == "folder" and place.data is not None:
        there = {path.name: path for path in place.data.iterdir() if path.is_dir() and not path.name.startswith(".")}
    if name not in there:
        raise SettingError("data", data, "an uploaded set, or a folder in the server's data folder")
    return [f"data.path={there[name]}"]


def _named(library: Library, setting: str, name: Any) -> str:
    if not isinstance(name, str):
        raise SettingError(setting, name, "a name of the library")
    for kind in ("model",) if setting == "model" else known():
        with contextlib.suppress(SettingError):
            return library.find(kind, name).source
    raise SettingError(setting, shown(name), "a name of the library")


# ---- in the run's process ------------------------------------------------------------------------


def run(place: Place, queue: Queue, id: int) -> None:
    """Trains a job and writes the outcome to the queue.

    Exits if a signal ended the run and nobody asked the job to stop; then the job waits again.
    """
    job = queue.get(id)
    if job is None:
        return
    folder = place.run(job.key)
    folder.mkdir(parents=True, exist_ok=True)
    with _logged(folder / "log.txt"), _watched(queue, job, folder):
        state, error = _trained(place, job, folder)
    queue.update(id, step=int(last_figures(folder).get("step", 0)))
    if state == STOPPED and (now := queue.get(id)) is not None and now.asked not in STOPS:
        queue.back(id)
        raise SystemExit(0)
    queue.finish(id, state, result(folder), place.hidden(error))


def _trained(place: Place, job: Job, folder: Path) -> tuple[str, str]:
    """Returns (how a run ended, its error)."""
    try:
        settings = _loaded(Library(place), job.request, job.key)
        from sdjax.runtime import accelerator, compile_cache
        from sdjax.service.train_program import prepared
        from sdjax.training import checks
        from sdjax.training.loop import train

        compile_cache.keep(steps=settings.steps)
        accelerator.check()
        train(prepared(checks.worded(settings), folder), folder)
    except SystemExit:
        return STOPPED, ""
    except Exception as error:  # the next job runs
        print(f"error: {error}", file=sys.stderr)
        kind = "" if isinstance(error, (ValueError, OSError, FloatingPointError)) else f"{type(error).__name__}: "
        return FAILED, kind + " ".join(str(error).split())[:500]
    return DONE, ""


@contextlib.contextmanager
def _logged(path: Path) -> Iterator[None]:
    """A context that appends this process's output to a file."""
    kept = os.dup(1), os.dup(2)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.dup2(file, 1)
        os.dup2(file, 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, old in zip((1, 2), kept, strict=True):
            os.dup2(old, number)
            os.close(old)
        os.close(file)


@contextlib.contextmanager
def _watched(queue: Queue, job: Job, folder: Path) -> Iterator[None]:
    """A context whose thread reports a run's progress to the queue and passes requests to stop to the run."""
    over, begun = threading.Event(), last_figures(folder).get("step")

    def look() -> None:
        said, told = begun, False
        queue.update(job.id, phase="preparing")
        while not over.wait(EVERY):
            figures = last_figures(folder)
            if figures.get("step") != said:
                said = figures.get("step")
                queue.update(job.id, phase="training", step=int(said or 0), tries=0)
            now = queue.get(job.id)
            if now is not None and now.asked in STOPS and not told:
                told = True
                os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


# ---- a run's results ---------------------------------------------------------------------------------


def result(folder: Path) -> dict[str, Any]:
    """Returns {"export": names of files, "samples": names, "figures": the last metrics} of a run's folder."""
    export = folder / "export"
    left = sorted(path.relative_to(export).as_posix() for path in export.rglob("*") if path.is_file())
    return {"export": left, "samples": samples(folder), "figures": last_figures(folder)}


def keep(place: Place, key: str, name: str) -> list[str]:
    """Copies a run's adapters under a name into the folder that prompts name; returns the files' names.

    Raises SettingError for an invalid or used name and for a run without adapters.
    """
    if not isinstance(name, str) or not SUBJECT.fullmatch(name):
        raise SettingError("name", name, "letters, digits, '-' and spaces, at most 60")
    there = adapters(place.run(key) / "export")
    if not there:
        whole = "the library already lists whole models and ControlNets"
        raise SettingError("job", key[:8], f"a run that exported an adapter; {whole}")
    place.named.mkdir(mode=0o700, exist_ok=True)
    made = kept_names(name, there)
    if used_stems(place) & {Path(one).stem for one in made}:
        raise SettingError("name", name, "an unused name")
    for path, one in zip(there, made, strict=True):
        with files.new_file(place.named / one) as temporary:
            shutil.copyfile(path, temporary)
    return made


def adapters(export: Path) -> list[Path]:
    """Returns the files of an export that prompts can name, by name: no ControlNets, no previews.

    Raises ValueError for a damaged file.
    """
    endings = set(kinds.endings()) - set(reading.SUFFIXES)
    there = sorted(path for path in export.glob("*") if path.suffix in endings and path.is_file())
    found = [(path, kinds.recognised(adapter_file.of(path))) for path in there]
    return [path for path, kind in found if kind is not None and kind.called]


def kept_names(name: str, there: list[Path]) -> list[str]:
    """Returns the names of a run's adapters in the folder that prompts name: NAME.pt, NAME-2.safetensors, ..."""
    return [f"{name}{f'-{i + 1}' if i else ''}{path.suffix}" for i, path in enumerate(there)]


def used_stems(place: Place) -> set[str]:
    """Returns the names in the folder that prompts name; a prompt's name has no suffix."""
    return {name for names in attach.Folder(place.named).files.values() for name in names}


def samples(folder: Path) -> list[str]:
    """Returns the names of a run's preview pictures."""
    return sorted(path.name for path in (folder / "samples").glob("*.png"))


def figures(folder: Path, most: int = 2000) -> list[dict[str, Any]]:
    """Returns the lines of a run's metrics.jsonl, at most `most`, evenly spaced."""
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    every = -(-len(lines) // most) or 1
    return [found for line in lines[::-every][::-1] if (found := _line(line))]


def last_figures(folder: Path) -> dict[str, Any]:
    """Returns the last line of a run's metrics.jsonl with a step, {} if there is none."""
    lines = tail(folder / "metrics.jsonl").splitlines()
    return next((found for line in reversed(lines) if "loss" in (found := _line(line))), {})


def tail(path: Path) -> str:
    """Returns the end of a text file, "" if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


def _line(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def order(folder: Path, what: str) -> None:
    """Asks a run, by a file in its folder, to draw previews ("sample") or save ("save") after the next step."""
    if what not in ORDERS:
        raise SettingError("what", what, f"one of {', '.join(ORDERS)}")
    if folder.is_dir():
        (folder / ORDERS[what]).touch()
