"""Detects whether a launcher started several processes, by its environment variables.

Sources: JAX's jax._src.clusters (Slurm, Open MPI), and the settings of jax.distributed.initialize.
"""

import os

# variable: what must be set beside it (sbatch sets SLURM_NTASKS for the one script that it starts too)
COUNTS = {"JAX_NUM_PROCESSES": None, "SLURM_NTASKS": "SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE": None}
PLACES = ("JAX_PROCESS_ID", "JAX_COORDINATOR_ADDRESS")  # of one of several, unless JAX_NUM_PROCESSES=1


def check_alone(does: str) -> None:
    """Raises ValueError if this process is one of several; does: the action that needs a single process."""
    for name, beside in COUNTS.items():
        count = os.environ.get(name)
        if count not in (None, "", "1") and (beside is None or os.environ.get(beside)):
            raise ValueError(f"{name}={count}: {does} runs in one process; start it once, as with srun --ntasks=1")
    for name in PLACES if os.environ.get("JAX_NUM_PROCESSES") != "1" else ():
        if os.environ.get(name):
            raise ValueError(f"{name}={os.environ[name]}: {does} runs in one process; expected it not to be set")
