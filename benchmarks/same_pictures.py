"""Compares the pictures of 60 requests by two checkouts: whether a change kept every bit.

    python benchmarks/same_pictures.py against CHECKOUT [--out outputs/same] [--only "LoRA;E4T"]
    PYTHONPATH=CHECKOUT python benchmarks/same_pictures.py make FILE.npz       # one checkout alone
    python benchmarks/same_pictures.py compare ONE.npz OTHER.npz

The requests are in request_rows.py, their models in request_models.py; CHECKOUT may have older names of settings.
The program compares the uint8 pictures and the float32 pixels before rounding; the exit status is 1 if any differ.
It needs the extra `test`, and minutes for each checkout, fewer with a filled compile cache.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from request_models import Models, here, module
from request_rows import REQUESTS, SPELLINGS, Request

import sdjax

ROOT = Path(__file__).resolve().parents[1]
PIXELS = "pixels of "


def make(models: Models, request: Request, pixels: list) -> np.ndarray:
    """Returns the pictures uint8 [B H W 3] of a request.  pixels: the list of `watch`, which it empties first.

    Raises RuntimeError if the list gets no float32 pixels.
    """
    settings = dict(request.settings)
    sd = models.get(request.model, settings.pop("adapters", ()))
    if "control" in settings:
        settings["control"] = models.controls(settings["control"])
    pixels.clear()
    made = getattr(sdjax, request.task)(sd, **spelled(settings))
    if not pixels:
        raise RuntimeError(f"{request.name}: no call of to_pictures was seen; `watch` must look elsewhere")
    return made


def spelled(settings: dict) -> dict:
    """Returns settings under the names of the imported sdjax, today's or older ones."""
    if today():
        return dict(settings)
    older = {name: SPELLINGS.get(name, (name, lambda value: value)) for name in settings if name != "variation_seed"}
    return {old: translate(settings[name]) for name, (old, translate) in older.items()}


def today() -> bool:
    """Returns whether the imported sdjax has today's names of settings; only then has it sampling/settings.py."""
    return here("sdjax.sampling.settings")


def watch(put: Callable = setattr) -> list:
    """Returns a list that gets the float32 pixels [B H W 3] of all pictures made from now on.

    put: called like setattr, for each module that turns pixels into pictures.
    """
    from sdjax import stable_diffusion

    seen, plain = [], stable_diffusion.to_pictures

    def watched(pixels):
        seen.append(np.asarray(pixels, np.float32))
        return plain(pixels)

    for task in {request.task for request in REQUESTS}:
        getattr(sdjax, task)  # imports its module
    for name, there in list(sys.modules.items()):
        if name.startswith("sdjax.") and getattr(there, "to_pictures", None) is plain:
            put(there, "to_pictures", watched)
    return seen


def make_all(file: Path, only: list) -> None:
    """Writes {name: pictures, "pixels of " + name: float32 [n]} of all requests, or of `only`, to an npz file."""
    module("sdjax.runtime.compile_cache", "sdjax.compiled").keep()
    seen, found = watch(), {}
    unknown = set(only) - {request.name for request in REQUESTS}
    if unknown:
        sys.exit(f"error: --only {', '.join(sorted(unknown))}: expected names of request_rows.py")
    with tempfile.TemporaryDirectory() as folder:
        models = Models(Path(folder))
        for request in REQUESTS:
            if only and request.name not in only:
                continue
            start = time.monotonic()
            found[request.name] = make(models, request, seen)
            found[PIXELS + request.name] = np.concatenate([one.ravel() for one in seen])
            print(f"{request.name:32} {time.monotonic() - start:5.1f} s", flush=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(file, **found)
    print(f"{sdjax.__file__}: {file}")


def compare(one: Path, other: Path) -> int:
    """Prints the largest difference of each request's pictures and pixels, of 255; returns 1 if any differ, else 0."""
    (one, other), differing = (dict(np.load(file)) for file in (one, other)), 0
    names = [name for name in {**one, **other} if not name.startswith(PIXELS)]
    print(f"{'request':32} {'pictures':>14} {'pixels':>14}")
    for name in names:
        if name not in one or name not in other:
            said = "in one file only"
        else:
            pairs = (name, 1.0), (PIXELS + name, 127.5)
            said = " ".join(f"{_apart(one[key], other[key], unit):>14}" for key, unit in pairs)
        differing += said.split() != ["equal", "equal"]
        print(f"{name:32} {said}")
    twice = len(names) - len({one[name].tobytes() for name in names if name in one})
    print(f"{len(names) - differing} of {len(names)} equal to the bit" + (f"; {twice} alike" if twice else ""))
    return int(differing > 0)


def _apart(one, other, unit):
    """Returns "equal", or the largest difference of two arrays times `unit`, as text."""
    if one.shape != other.shape:
        return f"{one.shape}/{other.shape}"
    if one.tobytes() == other.tobytes():
        return "equal"
    return f"{unit * np.abs(one.astype(np.float64) - other).max():.2g} of 255"


def against(checkout: Path, out: Path, only: list) -> int:
    """Makes the pictures with another checkout and with this one, each in its own process; returns compare's status."""
    made = []
    for name, root in (("other", checkout.resolve()), ("this", ROOT)):
        made.append(out / f"{name}.npz")
        command = [sys.executable, __file__, "make", str(made[-1]), "--only", ";".join(only)]
        print(f"--- {root}", flush=True)
        subprocess.run(command, env={**os.environ, "PYTHONPATH": str(root)}, check=True)
    return compare(*made)


def _names(text):
    return [name for name in text.split(";") if name]


def main() -> int:
    """Runs one of the commands; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    both = commands.add_parser("against", help="make both and compare")
    both.add_argument("checkout", type=Path, help="the other checkout's folder")
    both.add_argument("--out", type=Path, default=Path("outputs/same"))
    one = commands.add_parser("make", help="make the pictures with the sdjax in PYTHONPATH")
    one.add_argument("file", type=Path)
    two = commands.add_parser("compare", help="compare two files of `make`")
    two.add_argument("files", type=Path, nargs=2)
    for command in (both, one):
        command.add_argument("--only", type=_names, default=[], help="names of requests, with ; between")
    options = parser.parse_args()
    if options.command == "against":
        return against(options.checkout, options.out, options.only)
    if options.command == "compare":
        return compare(*options.files)
    make_all(options.file, options.only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
