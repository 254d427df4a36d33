"""Damages files of every kind and reads them: each must load, or be refused in one line that names it.

    python tests/fuzz/run.py --seed 7 --count 20000
    python tests/fuzz/run.py --seed 7 --number 12        # one file alone, with its traceback

A finding is an exception other than ValueError and OSError, or a message of several lines or without the file's name.
So is a crash, more than 10 seconds of processor time, or more memory than four times the file plus 200 MB.
OUT/findings-SEED.txt lists the findings; the program then ends with status 1.  The same seed damages the same files in
the same way.
"""

import argparse
import contextlib
import gc
import io
import multiprocessing
import os
import queue
import re
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # tiny models: compilation takes most of the time
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import jax  # noqa: E402
import numpy as np  # noqa: E402
from tqdm import tqdm  # noqa: E402

SECONDS, SHARE, ROOM = 10.0, 4, 200 << 20  # limits: processor time; memory, SHARE * file + ROOM bytes
MOST = 6 << 30  # bytes that a reader may grow by for one file before it is killed
LARGE = 2 << 30  # bytes that a reader may grow by before it drops its compiled programs between two files
START = 300.0  # limit in seconds of processor time for reading the undamaged seeds
SILENT = 3600.0  # seconds without a result after which an idle reader is killed


def status(name: str, process: str | int = "self") -> int:
    """Returns a process's memory in bytes: VmHWM, the peak of resident memory since `forget`, or VmRSS, the present."""
    with open(f"/proc/{process}/status") as file:
        return next((int(line.split()[1]) << 10 for line in file if line.startswith(name)), 0)


def forget() -> int:
    """Resets the peak of resident memory; returns the memory that is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmHWM")


def used(process: int) -> float:
    """Returns the processor time of a process in seconds."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def verdict(reader, path: Path, file: Path, size: int) -> str | None:
    """Reads a damaged file; returns what is wrong, None if nothing is."""
    before, begun = forget(), time.process_time()
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
    seconds, memory = time.process_time() - begun, status("VmHWM") - before
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


def chosen(seeds, number: int):
    """Returns the seed with a number: all seeds in turn, the slow ones in every fourth round."""
    from fuzz.readers import SLOW

    fast = [seed for seed in seeds if seed.reader not in SLOW]
    ring = [*(fast or seeds) * 4, *(seed for seed in seeds if seed.reader in SLOW)]
    return ring[number % len(ring)]


def one(seed, key: int, number: int, place: Path) -> str | None:
    """Damages one file and reads it; returns what is wrong."""
    from fuzz.readers import READERS

    root, file, size = damaged(seed, place, np.random.default_rng((key, number)))
    return verdict(READERS[seed.reader], root, file, size)


def worker(seeds, key, numbers, place, results) -> None:
    """Reads damaged files one after the other and reports each to `results`."""
    from fuzz.readers import READERS

    quiet = io.StringIO()
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        for seed in seeds:  # checks that each is valid, and compiles before memory and time are measured
            try:
                READERS[seed.reader](seed.root)
            except Exception as error:
                results.put((-1, f"the seed {seed.reader}:{seed.name} cannot be read: {type(error).__name__}: {error}"))
                return
    results.put((-1, None))
    own = status("VmRSS")
    for number in numbers:
        here = Path(tempfile.mkdtemp(dir=place))
        wrong = one(chosen(seeds, number), key, number, here)
        shutil.rmtree(here, ignore_errors=True)
        results.put((number, wrong))
        if status("VmRSS") > own + LARGE:  # compiled programs of many shapes, not one file's memory
            jax.clear_caches()
            gc.collect()
            own = status("VmRSS")  # what remains


def told(process, results, seconds: float) -> tuple[int, str | None] | str:
    """Returns the worker's next result, or a text why none comes.  seconds: limit of processor time until then."""
    heard, begun, before = time.monotonic(), used(process.pid), status("VmRSS", process.pid)
    while True:
        try:
            return results.get(timeout=1)
        except queue.Empty:
            if not process.is_alive():
                return f"crash: the process ended with {process.exitcode}"
            if status("VmRSS", process.pid) > before + MOST:
                return f"memory: more than {MOST >> 30} GB"
            if used(process.pid) - begun > seconds:
                return f"hangs: more than {seconds:.0f} s of processor time"
            if time.monotonic() - heard > SILENT:
                return f"hangs: nothing for {SILENT:.0f} s"


def check(seeds, key: int, numbers: list[int], place: Path, say) -> dict[int, str]:
    """Reads damaged files; returns {number: what is wrong} and calls say(number, what is wrong) after each."""
    found, left, context = {}, list(numbers), multiprocessing.get_context("spawn")
    while left:
        results = context.Queue()
        process = context.Process(target=worker, args=(seeds, key, left, place, results), daemon=True)
        process.start()
        first = told(process, results, START)
        if isinstance(first, str) or first[1] is not None:
            raise SystemExit(f"error: {first if isinstance(first, str) else first[1]}")
        while left:
            news = told(process, results, 3 * SECONDS)
            number, value = (left[0], news) if isinstance(news, str) else news
            left.pop(0)
            say(number, value)
            if value is not None:
                found[number] = value
            if isinstance(news, str):
                break
        process.kill()
        process.join()
    return found


def main() -> int:
    """Reads the damaged files and prints the findings; returns the exit status: 1 with findings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="decides how files are damaged")
    parser.add_argument("--count", type=int, default=20_000, help="number of files")
    parser.add_argument("--first", type=int, default=0, help="the number of the first")
    parser.add_argument("--only", default="", help="regular expression of the seeds' READER:NAME")
    parser.add_argument("--number", type=int, help="read only this file, and show its traceback")
    parser.add_argument("--out", type=Path, default=Path("outputs/fuzz"), help="folder for findings")
    options = parser.parse_args()
    import fuzz.seeds

    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{folder}/compiled"  # for the programs that a reader drops
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        seeds = [s for s in fuzz.seeds.make(Path(folder) / "seeds") if re.search(options.only, f"{s.reader}:{s.name}")]
        place = Path(folder) / "damaged"
        place.mkdir()
        if options.number is not None:
            return alone(seeds, options.seed, options.number, place, options.out)
        numbers = list(range(options.first, options.first + options.count))
        path = options.out / f"findings-{options.seed}.txt"
        with (
            tqdm(total=options.count, unit="file", dynamic_ncols=True, disable=None) as bar,
            open(path, "w" if options.first == 0 else "a", buffering=1) as file,
        ):

            def say(number, wrong):
                bar.update()
                if wrong is not None:
                    line = f"{number} {chosen(seeds, number).reader}:{chosen(seeds, number).name} {wrong}"
                    bar.write(line)
                    file.write(line + "\n")

            found = check(seeds, options.seed, numbers, place, say)
    kinds = Counter(wrong.partition(":")[0].partition(" ")[0] for wrong in found.values())
    print(f"{options.count} files of {len(seeds)} kinds, seed {options.seed}: {len(found)} findings", dict(kinds) or "")
    return int(bool(found))


def alone(seeds, key: int, number: int, place: Path, out: Path) -> int:
    """Reads one damaged file, keeps it in `out` and shows its traceback."""
    from fuzz.readers import READERS

    seed = chosen(seeds, number)
    root, file, _ = damaged(seed, place, np.random.default_rng((key, number)))
    shutil.copy(file, out / f"{key}-{number}-{file.name}")
    print(seed.reader, out / f"{key}-{number}-{file.name}", file.read_bytes()[:600], flush=True)
    READERS[seed.reader](root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
