"""Stops a run that is meant for a TPU or a GPU (ACCEL=tpu, ACCEL=cuda) before it falls back to the CPU.

The Makefile, the Dockerfile and the scripts of train/launch/ set the variable.
"""

import os
import subprocess
import sys

from sdjax.runtime import guard
from sdjax.settings import SettingError

PLATFORMS = {"cpu": "", "cuda": "gpu", "tpu": "tpu"}  # ACCEL: JAX's name; a CPU is always available


def check() -> None:
    """Raises ValueError if the variable ACCEL names an accelerator that JAX does not find."""
    said = _said()
    if not PLATFORMS[said]:
        return
    import jax

    try:
        there, why = jax.default_backend(), ""
    except RuntimeError as error:
        there, why = "nothing", f" ({guard.first_line(error)})"
    if there != PLATFORMS[said]:
        expected = f"a machine with one, jax[{'cuda12' if said == 'cuda' else said}] and its driver; or ACCEL=cpu"
        raise SettingError("ACCEL", said, expected, f"JAX finds no such device and would run on {there}{why}")


def check_apart() -> None:
    """Does the work of `check` in a process of its own, for a program that leaves the device to others."""
    if not PLATFORMS[_said()]:
        return
    code = "from sdjax.runtime import accelerator; accelerator.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise ValueError((done.stderr.strip().splitlines() or ["the check of ACCEL failed"])[-1])


def main() -> None:
    """Exits with the line of `check` on stderr if it raises."""
    try:
        check()
    except ValueError as error:
        sys.exit(str(error))


def _said() -> str:
    """Returns the variable ACCEL; raises SettingError for an unknown name."""
    said = os.environ.get("ACCEL") or "cpu"
    if said not in PLATFORMS:
        raise SettingError("ACCEL", said, f"one of {', '.join(PLATFORMS)}")
    return said
