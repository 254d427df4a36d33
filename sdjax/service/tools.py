"""Jobs on files: merge, resize and extract adapters, convert models; each in its own process.

    order = order_of(library, {"tool": "merge", "of": ["ink", "cat"], "strengths": [0.8, 0.5], "name": "both"})

A request names entries of the library and the result, never a path.  The programs are `sdjax adapters` and `sdjax
convert`; they compute on the CPU, because a worker uses the device.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sdjax.service.library import Entry, Library
from sdjax.service.place import Place
from sdjax.service.queue import CANCELLED, DONE, FAILED, STOPS, WAITING, Job, Queue
from sdjax.service.teaching import SUBJECT
from sdjax.settings import UNSAID, SettingError

TOOLS = ("merge", "resize", "extract", "convert")
KEYS = ("tool", "of", "strengths", "rank", "format", "name")
ADAPTERS = ("kohya", "diffusers", "peft")
MODELS = ("single-file", "diffusers")
MOST = 8  # most files of a merge
PATIENCE = 3.0  # seconds for a program to end
EVERY = 0.2  # seconds between reads of the queue


def order_of(library: Library, body: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the order of a job.

    body: tool: one of TOOLS.  of: names of entries; for extract, a model and one trained from it.  strengths: for
    merge.  rank: 0 keeps it.  format: of the file.  name: of the result.
    Raises SettingError in one line for an invalid body.
    """
    for key in body.keys() - set(KEYS):
        raise SettingError(key, UNSAID, f"one of {', '.join(KEYS)}", "unknown")
    order = {key: body[key] for key in KEYS if body.get(key) is not None}
    command(library, order)
    return order


def command(library: Library, order: Mapping[str, Any]) -> list[str]:
    """Returns the arguments of `sdjax` for an order.  Raises what order_of raises."""
    tool, names, name = order.get("tool"), order.get("of"), order.get("name", "")
    if tool not in TOOLS:
        raise SettingError("tool", tool, f"one of {', '.join(TOOLS)}")
    counts = {"merge": (1, MOST), "extract": (2, 2)}.get(tool, (1, 1))
    if not isinstance(names, list) or not counts[0] <= len(names) <= counts[1]:
        raise SettingError("of", names, {"extract": "a model and one trained from it"}.get(tool, "an entry"))
    if not isinstance(name, str) or not SUBJECT.fullmatch(name):
        raise SettingError("name", name, "letters, digits, '-' and spaces, at most 60")
    if tool == "convert":
        return _convert(library, names[0], order, name)
    entries = [library.find("model", one) if tool == "extract" else _adapter(library, one) for one in names]
    told = [one.source for one in entries]
    if tool == "merge":
        strengths = order.get("strengths") or [1.0] * len(told)
        if len(strengths) != len(told) or not all(type(one) in (int, float) for one in strengths):
            raise SettingError("strengths", strengths, f"{len(told)} numbers")
        told = [f"{path}:{strength:g}" for path, strength in zip(told, strengths, strict=True)]
    rank = order.get("rank", 0)
    if type(rank) is not int or not 0 <= rank <= 1024 or tool in ("resize", "extract") and not rank:
        raise SettingError("rank", rank, "a whole number, 1 to 1024")
    form = _form(order, ADAPTERS)
    out = _free(library.place.named / (f"{name}.safetensors" if form == "kohya" else name), name)
    return ["adapters", tool, *told, *(["--rank", str(rank)] if rank else []), "--format", form, "--out", str(out)]


def _convert(library: Library, source: Any, order: Mapping[str, Any], name: str) -> list[str]:
    entry, form = library.find("model", str(source)), _form(order, MODELS)
    if library.place.models is None:
        raise SettingError("convert", entry.name, "a server with --models DIR")
    out = library.place.models / (f"{name}.safetensors" if form == "single-file" else name)
    return ["convert", entry.source, str(_free(out, name)), "--format", form]


def _form(order: Mapping[str, Any], known: tuple[str, ...]) -> str:
    form = order.get("format") or known[0]
    if form not in known:
        raise SettingError("format", form, f"one of {', '.join(known)}")
    return form


def _adapter(library: Library, name: Any) -> Entry:
    for kind in ("lora", "embedding", "hypernet"):
        try:
            return library.find(kind, str(name))
        except SettingError:
            continue
    raise SettingError("of", name, "an adapter in the library")


def _free(path: Path, name: str) -> Path:
    if path.exists():
        raise SettingError("name", name, "an unused name")
    return path


def run(place: Place, queue: Queue, job: Job, stopped: Callable[[], bool] = lambda: False) -> None:
    """Runs a job in its own process and writes the outcome to the queue.

    stopped: whether the worker was told to end; the job then waits again.
    """
    try:
        arguments = command(Library(place), job.request)
        place.named.mkdir(mode=0o700, exist_ok=True)
        state, said = _done(queue, job, arguments, stopped)
    except (ValueError, OSError) as error:
        state, said = FAILED, str(error)
    if state == WAITING:
        queue.back(job.id)
    else:
        queue.finish(job.id, state, {}, place.hidden(said) if state == FAILED else "")


def _done(queue: Queue, job: Job, arguments: list[str], stopped: Callable[[], bool]) -> tuple[str, str]:
    """Returns (state of the job, its error)."""
    queue.update(job.id, phase="writing")
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    line = [sys.executable, "-m", "sdjax", *arguments]
    with subprocess.Popen(line, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        told = None
        while told is None:
            now = queue.get(job.id)
            if now is None or now.asked in STOPS or stopped():
                _end(process)
                return (CANCELLED if now is None or now.asked in STOPS else WAITING), ""
            with contextlib.suppress(subprocess.TimeoutExpired):  # reads continuously, so that the pipe never fills
                _, told = process.communicate(timeout=EVERY)
        lines = told.strip().splitlines() or ["the program failed"]
    said = next((text for text in reversed(lines) if text.startswith("error: ")), lines[-1]).removeprefix("error: ")
    return (DONE, "") if process.returncode == 0 else (FAILED, said[:500])


def _end(process: subprocess.Popen) -> None:
    """Ends a program, which first removes what is half done."""
    process.terminate()
    try:
        process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
