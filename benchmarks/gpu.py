"""Measures sdjax on a GPU against diffusers, eager and with torch.compile, in at most 8 minutes from empty caches.

    PYTHONPATH=. python benchmarks/gpu.py --out outputs/gpu                            on a GPU
    PYTHONPATH=. python benchmarks/gpu.py --flags --only pictures --out outputs/flags  with other flags of XLA
    PYTHONPATH=. python benchmarks/gpu.py --model random:tiny --inside                 a trial on a CPU

Each job is a process.  Jobs of a wave compile side by side and are timed alone.  The time of a first picture or step
counts from the start of its process.  A cold start has an empty compile cache, and two other jobs start beside it.  A
warm start runs alone, with the cache of the cold start.  Jobs that did not end in time are "not measured" in the table,
and so are diffusers' if it or torch is missing.  Writes OUT/gpu.json and OUT/gpu.md; OUT/logs has the jobs' output.
Weights are random.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gpu_flags import FLAGS

ROOT = Path(__file__).parents[1]
OURS, PEERS = "gpu_ours", "gpu_peers"  # modules with JOBS
FIRST = ["pictures", "training step, full", "training step, E4T tune"]  # cold, side by side; then warm, each alone
STEPS = ["training step, LoRA", "training step, DreamBooth", "training step, ControlNet", "training step, E4T pretrain"]
EAGER = ["eager pictures", "eager training", "eager LoRA"]
COMPILED = ["compiled pictures", "compiled training", "compiled LoRA"]
TABLE = {  # row: target
    "text2img, batch 1": "66 it/s",
    "text2img, batch 8": "1.15 x torch.compile",
    "text2img, loop from the host": "",
    "UNet call": "",
    "VAE decode": "",
    "group norm and silu": "",
    "training step, full": "1.0 x torch.compile",
    "training step, LoRA": "1.0 x torch.compile",
    "training step, DreamBooth": "",
    "training step, ControlNet": "",
    "training step, E4T pretrain": "",
    "training step, E4T tune": "",
    "E4T: 15 steps and 4 pictures": "6 s",
    "first picture": "40 s",
    "first picture, warm": "12 s",
    "first training step": "60 s",
    "first training step, warm": "12 s",
    "first E4T step": "75 s",
    "first E4T step, warm": "12 s",
}
WHO = ("sdjax", "diffusers", "torch.compile")


def parser():
    """Returns the command line's parser."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="random:sd15", help="a model's random shape, or a folder")
    made.add_argument(
        "--vision", default=None, help="E4T's image encoder; default: random:vit-h, the model's own if tiny"
    )
    made.add_argument("--rows", type=int, default=8, help="pictures at once, and rows of a training step")
    made.add_argument("--steps", type=int, help="sampling steps; default: 50, 3 if tiny")
    made.add_argument("--size", type=int, help="pixels; default: 512, 32 if tiny")
    made.add_argument("--minutes", type=float, default=8.0, help="limit of the whole run")
    made.add_argument("--out", type=Path, default=Path("outputs/gpu"))
    made.add_argument("--only", nargs="+", help="jobs, by name")
    made.add_argument("--flags", action="store_true", help="also pictures with other flags of XLA, see gpu_flags.py")
    made.add_argument("--inside", action="store_true", help="run all jobs in this process, one after the other")
    made.add_argument("--job", help=argparse.SUPPRESS)
    made.add_argument("--warm", action="store_true", help=argparse.SUPPRESS)
    return made


def main(arguments=None):
    """Measures and writes the table; returns the exit status, 1 if a job failed or ran out of time."""
    options = parser().parse_args(arguments)
    options.tiny = options.model == "random:tiny"
    options.steps = options.steps or (3 if options.tiny else 50)
    options.size = options.size or (32 if options.tiny else 512)
    options.vision = ("" if options.tiny else "random:vit-h") if options.vision is None else options.vision
    if options.job:
        return work(options)
    options.out.mkdir(parents=True, exist_ok=True)
    began, rows = time.time(), options.out / "rows.jsonl"
    rows.unlink(missing_ok=True)
    os.environ["GPU_ROWS"] = str(rows)
    failed = (inside if options.inside else side_by_side)(options, began + 60 * options.minutes)
    found = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    about = {**machine(), "seconds": round(time.time() - began), "failed": failed, "model": options.model}
    about |= {"rows": options.rows, "steps": options.steps, "size": options.size}
    (options.out / "gpu.json").write_text(json.dumps({"about": about, "rows": found}, indent=1) + "\n")
    (options.out / "gpu.md").write_text(markdown(about, found))
    print((options.out / "gpu.md").read_text())
    return int(bool(failed))


# ---- running -----------------------------------------------------------------------------------


def work(options):
    """Runs one job in this process; returns the exit status."""
    if module_of(options.job) == OURS:
        from sdjax.runtime import compile_cache

        compile_cache.keep(os.environ.get("GPU_CACHE"))
    perform(options)
    return 0


def module_of(job):
    """Returns the name of the module that has a job."""
    return PEERS if job in (*EAGER, *COMPILED) else OURS


def perform(options):
    """Runs options.job in this process."""
    importlib.import_module(module_of(options.job)).JOBS[options.job](options)


def waves(options):
    """Returns the waves, which run one after the other: lists of (job, whether warm) that run side by side."""
    peers = all(map(importlib.util.find_spec, ("torch", "diffusers", "transformers")))
    warm = [[(job, True)] for job in FIRST]
    rest = [*STEPS, *COMPILED] if peers else STEPS
    made = [[(job, False) for job in FIRST], *warm, [(job, False) for job in rest]]
    made += [[(job, False) for job in EAGER]] if peers else []
    chosen = [[one for one in wave if not options.only or one[0] in options.only] for wave in made]
    chosen += [[(job, False) for job in FLAGS]] * options.flags
    return [wave for wave in chosen if wave]


def inside(options, end):
    """Runs all jobs in this process with quick compilation; returns the names of the jobs that came too late."""
    late = []
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # a trial: its figures mean nothing
    from sdjax.runtime import compile_cache

    compile_cache.keep(options.out / "compiled", steps=1)
    for wave in waves(options):
        for job, warm in wave:
            options.job, options.warm = job, warm
            if time.time() > end:
                late.append(job)
                continue
            os.environ["GPU_BEGAN"] = str(time.time())
            perform(options)
    return late


def side_by_side(options, end):
    """Runs each wave's jobs as processes; returns the names of the jobs that failed or were stopped."""
    logs, failed = options.out / "logs", []
    logs.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        around = {**os.environ, "GPU_LOCK": f"{place}/lock", "GPU_CACHE": f"{place}/compiled"}
        around |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        around |= {"TORCHINDUCTOR_CACHE_DIR": f"{place}/inductor", "TRITON_CACHE_DIR": f"{place}/triton"}
        around.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes share the device
        for wave in waves(options):
            started = [(job, start(options, job, warm, around, logs)) for job, warm in wave]
            for job, child in started:
                try:
                    status = child.wait(max(0.0, end - time.time()))
                except subprocess.TimeoutExpired:
                    child.kill()
                    status = child.wait()
                failed += [job] if status else []
    return failed


def start(options, job, warm, around, logs):
    """Starts the process of a job."""
    command = [sys.executable, __file__, "--job", job, *["--warm"] * warm, "--model", options.model]
    command += ["--vision", options.vision, "--rows", str(options.rows), "--steps", str(options.steps)]
    command += ["--size", str(options.size)]
    with open(logs / f"{job}{', warm' * warm}.txt", "w") as log:
        around = {**around, "GPU_BEGAN": str(time.time())}
        around["XLA_FLAGS"] = f"{around.get('XLA_FLAGS', '')} {FLAGS.get(job, '')}".strip()
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=around)


# ---- the table ---------------------------------------------------------------------------------


def machine():
    """Returns versions, date, commit and the GPU's name from its driver."""
    versions = {}
    for name in ("jax", "jaxlib", "flax", "torch", "diffusers"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    commit = said(["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"])
    gpu = said(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"])
    return {
        "device": gpu or f"{platform.machine()}, {os.cpu_count()} cores",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit or "unknown",
        "python": platform.python_version(),
        **versions,
    }


def said(command):
    """Returns a command's output on one line, "" if it fails."""
    try:
        made = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return ""
    return " ".join(made.stdout.split()) if made.returncode == 0 else ""


def markdown(about, found):
    """Returns the table of measurements as Markdown."""
    names = ("device", "date", "commit", "python", "jax", "torch", "diffusers", "model", "size", "steps")
    head = "; ".join(f"{name} {about[name]}" for name in names if about.get(name))
    lines = [f"{head}. All of it in {about['seconds']} s.", ""]
    lines += ["| what | target | sdjax | diffusers | torch.compile | ratio | peak, GB | more |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- | --- |"]
    rows = {row.replace("batch 8", f"batch {about['rows']}"): target for row, target in TABLE.items()}
    rows |= {one["row"]: "" for one in found if "flags" in one}
    lines += [line_of(row, target, cells(row, found)) for row, target in rows.items()]
    if about["failed"]:
        lines += ["", f"Failed or out of time: {', '.join(about['failed'])}."]
    return "\n".join(lines) + "\n"


def cells(row, found):
    """Returns {who: the measurement of a row}."""
    name, warm = row.removesuffix(", warm"), row.endswith(", warm")
    return {one["who"]: one for one in found if one["row"] == name and bool(one.get("warm")) == warm}


def line_of(row, target, measured):
    """Returns a row's line; ratio: the seconds of torch.compile, else of eager diffusers, over ours."""
    shown = [figure(measured.get(who)) for who in WHO]
    ours, other = measured.get("sdjax"), measured.get("torch.compile") or measured.get("diffusers")
    ratio = f"{other['seconds'] / ours['seconds']:.2f}" if ours and other else ""
    peaks = [f"{measured[who]['peak_GB']:.1f}" for who in WHO if measured.get(who, {}).get("peak_GB")]
    return f"| {row} | {target} | {' | '.join(shown)} | {ratio} | {' / '.join(peaks)} | {more(ours)} |"


def figure(one):
    """Returns the seconds of a measurement and its steps per second, as text."""
    if one is None:
        return "not measured"
    return f"{one['seconds']:.4g} s" + (f" ({one['steps_s']:.1f} it/s)" if "steps_s" in one else "")


def more(one):
    """Returns further figures of sdjax as text: loading, stages of compilation, the host's milliseconds per step."""
    one, parts = one or {}, []
    if "loaded_s" in one:
        parts.append(f"loaded in {one['loaded_s']:.1f} s")
    if "copy_s" in one:
        parts.append(f"a copy: {1e3 * one['copy_s']:.3g} ms")
    if "flags" in one:
        parts.append(f"{one['flags']}")
    if "compile_s" in one:
        parts.append(f"traced {one['trace_s']:.1f}, lowered {one['lower_s']:.1f}, compiled {one['compile_s']:.1f} s")
    if "host_s" in one:
        times = [1e3 * one[name] for name in ("host_s", "dispatch_s", "python_s")]
        parts.append("host {:.1f}, dispatch {:.1f}, Python {:.1f} ms".format(*times))
    if "compiled_s" in one and "compile_s" not in one:
        parts.append(f"{one['programs']} programs, {one['compiled_s']:.1f} s, {one['from_cache']} from the cache")
    return "; ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
