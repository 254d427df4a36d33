"""Damages files of every kind and reads them: each must be read, or refused in one line that names it.

    python tests/fuzz/run.py --seed 7 --count 20000
    python tests/fuzz/run.py --seed 7 --number 12        # one file alone, with its traceback

A finding is a traceback of another kind, a message without the file's name or of several lines, more than 10 seconds,
or more memory than four times the file and 200 MB.  OUT/findings-SEED.txt lists the findings; the program then
ends with status 1.  The same seed damages the same files.
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import queue
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import numpy as np  # noqa: E402
from tqdm import tqdm  # noqa: E402

SECONDS, SHARE, ROOM = 10.0, 4, 200 << 20  # limits: of time, of memory beside the file's size
START = 600.0  # seconds: until the first file is read


def peak() -> int:
    """Returns the largest resident memory since `forget`, in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM"))


def forget() -> int:
    """Begins a new peak; returns the memory that is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def verdict(reader, path: Path, file: Path, size: int) -> str | None:
    """Returns what is wrong with how a damaged file is read, None where nothing is."""
    before, begun = forget(), time.monotonic()
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                reader(path)
    except (ValueError, OSError) as error:
        said = str(error)
        if "\n" in said.strip():
            return f"several lines: {said[:300]!r}"
        if file.name not in said and path.name not in said:
            return f"unnamed: {type(error).__name__}: {said[:300]}"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"traceback: {type(error).__name__}: {str(error)[:200]} at {Path(where.filename).name}:{where.lineno}"
    seconds, memory = time.monotonic() - begun, peak() - before
    if seconds > SECONDS:
        return f"slow: {seconds:.1f} s"
    if memory > SHARE * size + ROOM:
        return f"memory: {memory >> 20} MB for a file of {size} bytes"
    return None


def damaged(seed, place: Path, random) -> tuple[Path, Path, int]:
    """Writes a damaged copy of a seed below `place`; returns (what is read, the damaged file, its size)."""
    from fuzz.mutators import mutate

    root = place / seed.root.name
    if seed.root.is_dir():
        shutil.copytree(seed.root, root, copy_function=os.link)
    file = root / seed.file.relative_to(seed.root) if seed.root.is_dir() else root
    data = mutate(seed.file.read_bytes(), seed.file.name, random)
    file.unlink(missing_ok=True)
    file.write_bytes(data)
    return root, file, len(data)


def one(seed, chosen: int, number: int, place: Path) -> tuple[str | None, Path]:
    """Damages one file and reads it; returns (what is wrong, the damaged file)."""
    from fuzz.readers import READERS

    random = np.random.default_rng((chosen, number))
    root, file, size = damaged(seed, place, random)
    return verdict(READERS[seed.reader], root, file, size), file


def worker(seeds, chosen, numbers, place, results) -> None:
    """Reads damaged files one after the other and tells of each before it begins and when it is done."""
    from fuzz.readers import READERS, ready

    ready()
    quiet = io.StringIO()
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        for seed in seeds:  # each is valid; and its programs are compiled before memory and time are looked at
            READERS[seed.reader](seed.root)
    results.put((-1, None))
    for number in numbers:
        here = Path(tempfile.mkdtemp(dir=place))
        wrong, _ = one(seeds[number % len(seeds)], chosen, number, here)
        if wrong is None:
            shutil.rmtree(here, ignore_errors=True)
        results.put((number, wrong))


def told(process, results, seconds: float) -> tuple[int, str | None] | None:
    """Returns what the worker says next; None where it ends, or says nothing for so long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            return results.get(timeout=1)
        except queue.Empty:
            if not process.is_alive():
                return None
    return None


def check(seeds, chosen: int, numbers: list[int], place: Path, say) -> dict[int, str]:
    """Returns {number: what is wrong} of damaged files; kills a reader after three times the limit."""
    found, left, context = {}, list(numbers), multiprocessing.get_context("spawn")
    while left:
        results = context.Queue()
        process = context.Process(target=worker, args=(seeds, chosen, left, place, results), daemon=True)
        process.start()
        if told(process, results, START) is None:
            raise SystemExit("error: a seed cannot be read, or the readers do not start; see above")
        while left:
            news = told(process, results, 3 * SECONDS)
            number, value = news or (left[0], "hangs" if process.is_alive() else "crash: the process ended")
            left.pop(0)
            say(number)
            if value is not None:
                found[number] = value
            if news is None:
                break
        process.kill()
        process.join()
    return found


def main() -> int:
    """Runs and returns the exit status: 1 with findings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="decides how files are damaged")
    parser.add_argument("--count", type=int, default=20_000, help="how many files")
    parser.add_argument("--only", help="seeds whose reader or name holds this text")
    parser.add_argument("--number", type=int, help="one file alone, with its traceback")
    parser.add_argument("--out", type=Path, default=Path("outputs/fuzz"), help="folder for findings")
    options = parser.parse_args()
    from fuzz import seeds as valid

    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        seeds = [s for s in valid.make(Path(folder) / "seeds") if (options.only or "") in f"{s.reader}:{s.name}"]
        place = Path(folder) / "damaged"
        place.mkdir()
        if options.number is not None:
            from fuzz.readers import READERS

            seed = seeds[options.number % len(seeds)]
            root, file, _ = damaged(seed, place, np.random.default_rng((options.seed, options.number)))
            print(seed.reader, file, file.read_bytes()[:600], flush=True)
            READERS[seed.reader](root)
            return 0
        with tqdm(total=options.count, unit="file", dynamic_ncols=True) as bar:
            found = check(seeds, options.seed, list(range(options.count)), place, lambda number: bar.update())
        lines = [
            f"{n} {seeds[n % len(seeds)].reader}:{seeds[n % len(seeds)].name} {wrong}" for n, wrong in found.items()
        ]
        (options.out / f"findings-{options.seed}.txt").write_text("\n".join(lines) + "\n" * bool(lines))
    kinds = Counter(wrong.partition(":")[0].partition(" ")[0] for wrong in found.values())
    print("\n".join(lines[:100]))
    print(
        f"{options.count} files of {len(seeds)} kinds, seed {options.seed}: {len(found)} findings {dict(kinds) or ''}"
    )
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
