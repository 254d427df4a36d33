"""Runs several processes as one run: finds and joins them, makes them agree, and ends them together.

    join()                               # first in a program, before JAX looks for devices
    path = led(lambda: choose())         # process 0 calls it, and all get the result
    agree("settings", text)              # ValueError if processes differ

JAX finds the processes of TPU slices, Slurm, GKE and Open MPI (jax.distributed.initialize).  Otherwise set three
variables: JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
"""

import hashlib
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from sdjax.runtime import guard, room
from sdjax.settings import SettingError

HEARTBEAT = 30  # a process counts as lost after this many seconds without a heartbeat
LONG = 7 * 24 * 3600  # seconds that processes wait for another one that is alive
ROOM = 1 << 16  # most bytes of a result of `led`
FAILED = 1  # exit status
ADDRESS, NUMBER, PLACE = OWN = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# variable: another one that must also be set (sbatch sets SLURM_NTASKS even for the single script that it starts)
COUNTS = {"SLURM_NTASKS": "SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE": None, "MEGASCALE_NUM_SLICES": None}
HOSTS = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")  # the hosts of a slice, separated by commas


def found() -> str:
    """Returns the variable of a launcher that started several processes, such as "SLURM_NTASKS=2"; "" without one."""
    if os.environ.get(NUMBER) != "1":
        for name in (NUMBER, *OWN):
            if os.environ.get(name):
                return f"{name}={os.environ[name]}"
    for name, beside in COUNTS.items():
        if os.environ.get(name) not in (None, "", "1") and (beside is None or os.environ.get(beside)):
            return f"{name}={os.environ[name]}"
    return next((f"{name}={os.environ[name]}" for name in HOSTS if "," in os.environ.get(name, "")), "")


def join() -> None:
    """Joins the other processes of this run, if a launcher started several; call it before JAX looks for devices.

    Raises ValueError for variables that do not fit, and if the other processes do not join.
    """
    import jax

    if jax.distributed.is_initialized() or not (found() or _on_tpu()):
        return
    address, number, place = os.environ.get(ADDRESS) or None, _whole_number(NUMBER), _whole_number(PLACE)
    told = None not in (address, number, place)  # then JAX need not find anything
    # A CPU runs programs side by side; collectives of two of them can wait for each other (jax issue 25861).
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        jax.distributed.initialize(
            address, number, place,
            cluster_detection_method="deactivate" if told else None,
            heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=LONG,
        )  # fmt: skip
    except (ValueError, TypeError, RuntimeError, KeyError) as error:
        lacking = next((name for name in OWN if not os.environ.get(name)), "")
        hint = f"; without a launcher that JAX knows, set {lacking}" if lacking else ""
        raise ValueError(
            f"{found() or 'TPU'}: the processes do not come together: {guard.first_line(error)}{hint}"
        ) from None


def _on_tpu():
    """Returns whether this machine has TPU chips; without chips, JAX sets a variable at its import."""
    return importlib.util.find_spec("libtpu") is not None and "TPU_SKIP_MDS_QUERY" not in os.environ


def _whole_number(name):
    """Returns the number in a variable, or None if it is not set."""
    text = os.environ.get(name) or None
    if text is not None and not text.isdecimal():
        raise SettingError(name, text, "a whole number")
    return None if text is None else int(text)


def check_joined(does: str) -> None:
    """Raises ValueError if a launcher started several processes that have not joined.

    does: the work that each would do alone, for the message.
    """
    import jax

    if found() and not jax.distributed.is_initialized():
        raise ValueError(f"{found()}: {does} would run in each process alone; join them first (processes.join)")


def several() -> bool:
    """Returns whether this process is one of several that have joined."""
    import jax

    return jax.distributed.is_initialized() and jax.process_count() > 1


def first() -> bool:
    """Returns whether this process writes files and prints: process 0, or the only one."""
    import jax

    return not several() or jax.process_index() == 0


def place() -> tuple[int, int]:
    """Returns (the number of this process from 0, how many there are)."""
    import jax

    return (jax.process_index(), jax.process_count()) if several() else (0, 1)


def say(text: str) -> None:
    """Prints a line, once for all processes."""
    if first():
        print(text, flush=True)


def together(act: Callable[[], Any]) -> Any:
    """Calls act in each process and returns its result here; if one fails, all end.  act may call `together` itself.

    Raises act's error in this process, or SystemExit(1) if another process failed; that one reports the reason.
    """
    if not several():
        return act()
    result = error = None
    try:
        result = act()
    except Exception as caught:
        error = caught
    except SystemExit as caught:  # of an inner `together`, whose failed process is in this one now
        if caught.code != FAILED:
            raise
        error = caught
    fine = every(error is None)
    if error is not None:
        raise error
    if not fine:
        raise SystemExit(FAILED)
    return result


def led(act: Callable[[], Any]) -> Any:
    """Calls act in process 0 only and returns its result, a value for JSON, in every process.

    Raises act's error in process 0, and SystemExit(1) in the others.
    """
    if not several():
        return act()
    import numpy as np
    from jax.experimental import multihost_utils

    result = together(lambda: json.dumps(act()).encode() if first() else b"")
    if len(result) > ROOM:
        raise ValueError(f"a result of {len(result)} bytes: expected at most {ROOM}")
    text = np.frombuffer(result.ljust(ROOM), np.uint8)
    return json.loads(multihost_utils.broadcast_one_to_all(text).tobytes())


def agree(what: str, text: str) -> None:
    """Raises ValueError if the processes have different texts."""
    if not several():
        return
    import numpy as np
    from jax.experimental import multihost_utils

    own = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    if (multihost_utils.process_allgather(own) != own).any():
        raise ValueError(f"{what}: not the same in all processes; start them alike, with the same files")


def every(flag: bool) -> bool:
    """Returns whether a flag is true in all processes; waits for the slowest one."""
    if not several():
        return flag
    import numpy as np
    from jax.experimental import multihost_utils

    wait()
    return bool(multihost_utils.process_allgather(np.array([flag], np.int32)).all())


def wait() -> None:
    """Waits until all processes have arrived, for any time; a lost process ends the wait."""
    if not several():
        return
    from orbax.checkpoint import multihost

    multihost.get_barrier_sync_fn()(key="sdjax", timeout_ms=LONG * 1000)


def ended(run: Callable[[], int]) -> int:
    """Returns run()'s exit status; if it fails and there are other processes, ends this process at once.

    Otherwise it would wait for the others, and they for it.  All processes end together with 0, or with a SystemExit
    other than that from `together`.
    """
    try:
        status = run()
    except SystemExit as end:
        if not several() or end.code != FAILED:
            raise
        status = FAILED
    except BaseException:
        if not several():
            raise
        traceback.print_exc()
        status = FAILED
    if status and several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def broken(error: RuntimeError) -> bool:
    """Returns whether JAX raised an error because another process is lost, which ends a collective or a wait."""
    import jax

    return several() and isinstance(error, jax.errors.JaxRuntimeError) and not room.lacks_memory(error)
