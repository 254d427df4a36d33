"""Makes the embedded model from scratch: pictures, autoencoder, CLIP, UNet, E4T, judges, figures and card.

    make pocket                                   # on a GPU: 9 minutes of training, pictures of 128 x 128 pixels
    make pocket ARGS="scale=0.01 minutes=4"       # the whole chain in small, on two cores
    make pocket ARGS="out=sdjax/pocket"           # replaces the package's weights
    python train/make_pocket.py [NAME=VALUE ...]

`Make` below describes the settings.  Each stage runs its recipe of configs/pocket/ in WORK/STAGE.  Rerun the command
after any interruption: finished stages stay, an unfinished one resumes from its newest checkpoint.  On a GPU, the
later stages compile while the first one trains.
"""

import dataclasses
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from sdjax import settings
from sdjax.settings import ABOVE_0, SEED, SettingError, check

ROOT = Path(__file__).parents[1]
SHAPE = "new:pocket128"
PICTURES, LARGE, SIDE = 120_000, 6_000, 128  # drawn pictures; more pictures of twice the side, for --hires; the side
LEAST = 8  # minimum rows of a batch at any scale
STEPS = 1_000_000  # more than the clock allows
RESERVE = 0.3  # minutes that the last stage needs to write its model
SHARD = 0.0167  # GB, 16 MiB


@dataclass(frozen=True)
class Make:
    """The settings of the command.

    minutes: training time of all stages together, with compilation.
    scale: share of the pictures and of the rows of a batch; 1 is meant for a GPU of 80 GB, where it has not run yet.
    out: the model's folder.  work: the folder of runs, drawn pictures and figures.
    figures: measure the model with benchmarks/pocket.py and write its card; needs torch.
    judges: train new judges (benchmarks/judges.py) in WORK/judges; needs torch.
    people: number of held-out people for E4T's figures.
    workers: processes that draw and prepare batches; 0 takes all cores but one.
    compute: data type of the computation; "" is bfloat16 on an accelerator, float32 on a CPU.
    """

    minutes: float = 9.0
    scale: float = 1.0
    seed: int = 0
    out: str = "outputs/pocket"
    work: str = "outputs/pocket-work"
    figures: bool = True
    judges: bool = True
    people: int = 64
    workers: int = 0
    compute: str = ""

    def __post_init__(self):
        check(self, minutes=ABOVE_0, scale=ABOVE_0, seed=SEED)
        if not 0 < self.scale <= 1:
            raise SettingError("scale", self.scale, "a number above 0, at most 1")


@dataclass(frozen=True)
class Stage:
    """A run: its recipe's name, its share of the time, its batch size, the stage whose model it starts from, overrides.

    The batch size is for scale 1.
    """

    name: str
    share: float
    rows: int
    base: str
    pictures: float  # share of the drawn pictures
    sizes: bool  # also pictures of twice the side
    more: tuple[str, ...]


# Rates for batches 8 to 16 times those of the recipes (our choice, not tuned at full size).
STAGES = (
    Stage("vae", 0.22, 128, "", 0.25, False, ("optim.lr=1.5e-3", "optim.warmup=100", "ema=0.998")),
    Stage("clip", 0.10, 1024, "vae", 1.0, False, ("optim.lr=1e-3", "optim.warmup=50")),
    Stage("unet", 0.29, 512, "clip", 1.0, True, ("optim.lr=1e-3", "optim.warmup=200", "ema=0.998")),
    Stage("e4t", 0.39, 512, "unet", 1.0, True, ("min_snr=1.0", "optim.warmup=100", "ema=0.998", "vision={clip}")),
)


def main(arguments: list[str]) -> int:
    """Makes the model; returns the exit status."""
    if arguments == ["--help"]:
        print(__doc__)
        print(Make.__doc__)
        return 0
    try:
        make = settings.override(Make(), arguments)
        began, fast = time.monotonic(), accelerated()
        make = dataclasses.replace(make, compute=make.compute or ("bfloat16" if fast else "float32"))
        train(make, fast)
        export(make)
        trained = time.monotonic() - began
        measured(make)
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run the command again to go on", file=sys.stderr)
        return 130
    print(f"{make.out}: {trained / 60:.1f} minutes of training, {(time.monotonic() - began) / 60:.1f} in all")
    return 0


def accelerated() -> bool:
    """Returns whether JAX has a device other than the CPU; a child process asks, so that the device stays free."""
    asked = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    said = subprocess.run(asked, capture_output=True, text=True, check=True, env=_environment()).stdout.split()
    return said[-1] != "cpu"


def train(make: Make, beside: bool) -> None:
    """Runs the unfinished stages one after the other, within make.minutes.

    beside: whether to compile the later stages while the first one trains.
    """
    todo = [stage for stage in STAGES if not _finished(make, stage)]
    deadline = time.monotonic() + 60 * (make.minutes * sum(stage.share for stage in todo) - RESERVE)
    children = _beside(make, todo) if beside and todo else []
    try:
        for number, stage in enumerate(todo):
            left = (deadline - time.monotonic()) / 60
            minutes = max(0.05, left * stage.share / sum(one.share for one in todo[number:]))
            print(f"\n{stage.name}: {minutes:.2f} minutes", flush=True)
            _program("train/run.py", *run_of(make, stage), f"minutes={minutes:.3f}")
    finally:
        for child in children:
            child.kill()
            child.wait()
    shutil.rmtree(Path(make.work) / "warm", ignore_errors=True)


def run_of(make: Make, stage: Stage) -> list[str]:
    """Returns the arguments of train/run.py for a stage."""
    rows = max(LEAST, round(stage.rows * make.scale))
    count = 4 * max(LEAST, round(PICTURES * make.scale * stage.pictures / 4))
    sizes = [f"data.size={2 * SIDE}", "data.buckets=2", f"data.large={4 * max(LEAST, round(LARGE * make.scale / 4))}"]
    return [
        f"configs/pocket/{stage.name}.py", f"model={_model(make, stage)}", f"out={make.work}/{stage.name}",
        f"seed={make.seed}", f"steps={STEPS}", f"compute={make.compute}", f"log={50 if make.scale == 1 else 1}",
        "checkpoint=1000", "keep=1", "preview=0",
        f"data.batch={rows}", f"data.count={count}", *(sizes if stage.sizes else ()), "data.resident=True",
        f"data.cache={make.work}/cache", f"data.workers={_workers(make)}", "public=True",
        *(text.format(clip=f"{make.work}/clip/export") for text in stage.more),
    ]  # fmt: skip


def export(make: Make) -> None:
    """Writes the last stage's model to make.out in float16, in files of at most 16 MiB."""
    source = f"{make.work}/{STAGES[-1].name}/export"
    more = ("--dtype", "float16", "--no-reference", "--shard-size", str(SHARD))
    _program("-m", "sdjax.convert", source, make.out, *more)


def measured(make: Make) -> None:
    """Trains the judges and measures the model if the settings ask for it, and writes the model's card."""
    work, small = Path(make.work), make.scale < 1
    if make.judges:
        drawn = max(256, 32 * round(40_000 * make.scale / 32))
        steps = max(2, round(3000 * make.scale))
        for name in (name for name in ("what", "who") if not (work / "judges" / f"{name}.safetensors").exists()):
            sizes = ("--steps", str(steps), "--draw", str(drawn), "--size", str(SIDE))
            sizes += ("--workers", str(_workers(make)), "--count", "400" if small else "4000")
            places = ("--data", str(work / "judges-data"), "--out", str(work / "judges"))
            _program("benchmarks/judges.py", "train", "--judge", name, *sizes, *places)
    if make.figures:
        tasks = {
            "vae": ("--count", "16") if small else (),
            "prompts": ("--count", "8") if small else (),
            "e4t": ("--arm", "encoder", "--identities", "1" if small else str(make.people)),
        }
        for task, more in tasks.items():
            _program("benchmarks/pocket.py", task, "--model", make.out, "--out", str(work / "figures"), *more)
    told = [f"{name}={value}" for name, value in dataclasses.asdict(make).items()]
    _program("benchmarks/pocket_card.py", make.out, make.work, *told)


def _model(make, stage):
    return f"{make.work}/{stage.base}/export" if stage.base else SHAPE


def _finished(make, stage):
    return (Path(make.work) / stage.name / "export" / "model_index.json").is_file()


def _workers(make):
    return make.workers or max(1, len(os.sched_getaffinity(0)) - 1)


def _beside(make, todo):
    """Starts drawing and the other stages' compilation, which run while the first stage trains; returns the processes.

    The compile cache keeps the compiled programs.  A step's program depends only on shapes, so a new model's weights
    and a batch or two of few pictures compile the same one.  Each process gets a fifth of the device's memory; even a
    batch that does not fit into it is compiled.
    """
    started, clip = [], STAGES[1]
    if clip in todo:
        arguments = [*run_of(make, clip), f"model={SHAPE}"]
        started.append(_started("train/cache.py", *arguments, JAX_PLATFORMS="cpu"))
    for stage in todo[1:]:
        rows = max(LEAST, round(stage.rows * make.scale))
        few = [f"data.count={rows}", *([f"data.large={rows}"] if stage.sizes else ())]
        fresh = [f"model={SHAPE}", f"out={make.work}/warm/{stage.name}", "data.cache=''", "data.workers=2", "vision="]
        once = ["steps=2", "minutes=5", "checkpoint=0"]
        started.append(_started("train/run.py", *run_of(make, stage), *few, *fresh, *once))
    return started


def _started(*command, **more):
    """Starts a program without showing its output; it may fail."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    env = _environment() | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.2"} | more
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, env=env, **quiet)


def _program(*command):
    """Runs a program of the repository; raises CalledProcessError if it fails."""
    subprocess.run([sys.executable, *command], cwd=ROOT, env=_environment(), check=True)


def _environment():
    """Returns an environment for this checkout's code; JAX allocates device memory on demand, as programs share it."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
