"""Several processes as one run: found, joined, agreed, and ended together.

    joined = join()                      # first thing in a program, before JAX looks for devices
    path = led(lambda: choose())         # process 0 does it, and all get the result
    agree("settings", text)              # ValueError where processes differ

JAX finds the processes of TPU slices, Slurm, GKE and Open MPI (jax.distributed.initialize).  Elsewhere three variables
say it: JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
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

HEARTBEAT = 30  # seconds without a sign after which a process counts as lost
LONG = 7 * 24 * 3600  # seconds that processes wait for another that is alive
ROOM = 1 << 16  # bytes of a result of `led`
FAILED = 1  # exit status
ADDRESS, NUMBER, PLACE = OWN = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# variable: what must be set beside it (sbatch sets SLURM_NTASKS for the one script that it starts too)
COUNTS = {"SLURM_NTASKS": "SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE": None, "MEGASCALE_NUM_SLICES": None}
HOSTS = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")  # of a slice, with commas between them


def found() -> str:
    """Returns the setting of a launcher that started several processes, such as "SLURM_NTASKS=2"; "" without one."""
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

    Raises ValueError for variables that do not fit, and where the others do not come.
    """
    import jax

    if jax.distributed.is_initialized() or not (found() or _on_tpu()):
        return
    address, number, place = os.environ.get(ADDRESS) or None, _whole_number(NUMBER), _whole_number(PLACE)
    told = None not in (address, number, place)  # then there is nothing to find
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
    """Returns whether this machine has TPU chips; JAX says at its import where it has none."""
    return importlib.util.find_spec("libtpu") is not None and "TPU_SKIP_MDS_QUERY" not in os.environ


def _whole_number(name):
    """Returns the number in a variable, None where it is not set."""
    text = os.environ.get(name) or None
    if text is not None and not text.isdecimal():
        raise SettingError(name, text, "a whole number")
    return None if text is None else int(text)


def check_joined(does: str) -> None:
    """Raises ValueError if a launcher started several processes that have not joined; does: what would run in each."""
    import jax

    if found() and not jax.distributed.is_initialized():
        raise ValueError(f"{found()}: {does} would run in each process alone; join them first (processes.join)")


def several() -> bool:
    """Returns whether this process is one of several that have joined."""
    import jax

    return jax.distributed.is_initialized() and jax.process_count() > 1


def first() -> bool:
    """Returns whether this process is the one that writes files and speaks: process 0, or the only one."""
    import jax

    return not several() or jax.process_index() == 0


def say(text: str) -> None:
    """Prints a line, once for all processes."""
    if first():
        print(text, flush=True)


def together(act: Callable[[], Any]) -> Any:
    """Returns act(), which each process does by itself; where one fails, all end.

    Raises what act raises here, and SystemExit(1) where another process failed, which says why.
    """
    if not several():
        return act()
    result = error = None
    try:
        result = act()
    except Exception as caught:
        error = caught
    fine = every(error is None)
    if error is not None:
        raise error
    if not fine:
        raise SystemExit(FAILED)
    return result


def led(act: Callable[[], Any]) -> Any:
    """Returns on every process what act() returns on process 0, which alone calls it: a value that JSON can hold.

    Raises what act raises on process 0, and SystemExit(1) on the others.
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
    """Raises ValueError where the processes have different texts."""
    if not several():
        return
    import numpy as np
    from jax.experimental import multihost_utils

    own = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    if (multihost_utils.process_allgather(own) != own).any():
        raise ValueError(f"{what}: not the same in all processes; start them alike, with the same files")


def every(flag: bool) -> bool:
    """Returns whether a flag is true in all processes, however long the others compute theirs."""
    if not several():
        return flag
    import numpy as np
    from jax.experimental import multihost_utils

    wait()
    return bool(multihost_utils.process_allgather(np.array([flag], np.int32)).all())


def wait() -> None:
    """Waits until all processes are here, however long the others compute; a lost process ends it."""
    if not several():
        return
    from orbax.checkpoint import multihost

    multihost.get_barrier_sync_fn()(key="sdjax", timeout_ms=LONG * 1000)


def ended(run: Callable[[], int]) -> int:
    """Returns run()'s exit status, but where it fails and there are others this process ends at once.

    Otherwise it would wait for them, and they for it.  All end together with 0, or with a SystemExit other than that of
    `together`.
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
    """Returns whether JAX raised an error because another process is lost: a collective or a wait broke off."""
    import jax

    return several() and isinstance(error, jax.errors.JaxRuntimeError) and not room.lacks_memory(error)
