"""Runs all stages at full size: a checkpoint on disk, E4T tuning on a photograph, pictures, export, and diffusers.

    python benchmarks/full_size.py --image photo.jpg [--shape sd15] [--vision vit-l] [--steps 2] [--size 256]

The weights are random (float16 on disk, in the real layout), because only memory and time are measured.  Each stage is
a process; the program prints its seconds and its peak of resident memory.  The tuning fits by these settings: frozen
weights and computation in bfloat16, recomputed activations, factored second moments and no first moments (adafactor).
Needs the extra `torch`, 20 GB of disk and 24 GB of memory.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

LIMIT = 22e9
IN_DIFFUSERS = """
import sys, torch
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.bfloat16, safety_checker=None)
size, steps = int(sys.argv[2]), int(sys.argv[3])
image = pipe("a photo of *s on the beach", num_inference_steps=steps, height=size, width=size).images[0]
image.save(sys.argv[4])
"""


def stage(name, command):
    """Runs a command and returns {"seconds", "bytes"}, its peak memory; if it fails, the program ends."""
    print(f"--- {name}: {' '.join(map(str, command[1:6]))} ...", flush=True)
    start = time.monotonic()
    child = subprocess.Popen(list(map(str, command)))
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"error: {name} ended with status {child.returncode}")
    found = {"seconds": round(time.monotonic() - start, 1), "bytes": usage.ru_maxrss * 1024}
    print(f"--- {name}: {found['seconds']} s, peak {found['bytes'] / 1e9:.2f} GB", flush=True)
    return found


def main():
    """Runs the stages and writes OUT/full_size.json; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", required=True, help="a photograph")
    parser.add_argument("--shape", default="sd15", help="sd15 or sd21")
    parser.add_argument("--vision", default="vit-l", help="vit-l or vit-h")
    parser.add_argument("--steps", type=int, default=2, help="tuning steps")
    parser.add_argument("--size", type=int, default=256, help="pixels")
    parser.add_argument("--batch", type=int, default=4, help="rows of a tuning step")
    parser.add_argument("--sampling", type=int, default=4, help="steps of the pictures")
    parser.add_argument("--out", type=Path, default=Path("outputs/full_size"))
    options = parser.parse_args()
    base, run, plain = (options.out / name for name in ("base", "run", "plain"))
    options.out.mkdir(parents=True, exist_ok=True)
    python, found = sys.executable, {}
    if not base.is_dir():
        shape, tower = f"random:{options.shape}", f"random:{options.vision}"
        made = [python, "-m", "sdjax.convert", shape, base, "--dtype", "float16", "--vision", tower]
        found["checkpoint"] = stage("checkpoint", made)
    tune = [python, "train/run.py", "configs/e4t_tune.py", f"model={base}", "init=''", f"data.path={options.image}"]
    tune += ["method.parts.0.domain=a"]  # random models have a vocabulary of letters
    tune += [f"data.size={options.size}", f"data.batch={options.batch}", f"steps={options.steps}", "log=1"]
    tune += ["frozen=bfloat16", "compute=bfloat16", "remat=true", "optim.kind=adafactor", "optim.lr=1e-5", f"out={run}"]
    found["tuning"] = stage("tuning", tune)
    sample = [python, "sample/text2img.py", "--model", run / "export", "--prompt", "a photo of *s on the beach"]
    sample += ["--size", options.size, "--steps", options.sampling, "--dtype", "bfloat16"]
    sample += ["--out", options.out / "pictures"]
    found["pictures"] = stage("pictures", sample)
    found["export"] = stage("export", [python, "-m", "sdjax.convert", run / "export", plain, "--dtype", "float16"])
    picture = options.out / "diffusers.png"
    found["diffusers"] = stage(
        "diffusers", [python, "-c", IN_DIFFUSERS, plain, options.size, options.sampling, picture]
    )
    settings = {**vars(options), "out": str(options.out)}
    (options.out / "full_size.json").write_text(json.dumps({**settings, **found}, indent=1))
    peak = max(one["bytes"] for one in found.values())
    print(f"peak {peak / 1e9:.2f} GB (limit {LIMIT / 1e9:.0f}), {sum(one['seconds'] for one in found.values()):.0f} s")
    return int(peak > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
