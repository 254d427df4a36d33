"""Compiles quickly on a CPU and caches compiled programs on disk."""

import importlib.metadata
import importlib.util
import os
from pathlib import Path

# Halves compile time on two cores, with equally fast steps; docs/log/2026-11.md, "Compiling for a CPU".
QUICK = ("--xla_cpu_use_fusion_emitters=false", "--xla_backend_optimization_level=1")
# Reduces the rest to two thirds, with steps that take 7 % longer; docs/log/2026-11.md, "Compiling for size".
SMALL = ("--xla_backend_extra_options=xla_cpu_disable_loop_unrolling,xla_cpu_optimize_for_size",)
FEW = 50  # longest run, in steps, that gains from it
ACCELERATED = ("jax_plugins", "libtpu")  # packages of accelerators, which keep XLA's own settings


def keep(folder: str | Path | None = None, steps: int | None = None) -> None:
    """Turns on JAX's compile cache in `folder`, by default ~/.cache/sdjax/compiled; for programs, not imports.

    steps: number of steps of a training run.
    JAX_COMPILATION_CACHE_DIR overrides the default.  Anyone who can write to the folder can run code.  On a CPU it also
    sets the flags QUICK, and SMALL for up to FEW steps; XLA_FLAGS override them.
    """
    if _knows_quick() and not any(map(importlib.util.find_spec, ACCELERATED)):
        small = SMALL if steps is not None and steps <= FEW else ()
        os.environ["XLA_FLAGS"] = " ".join([*QUICK, *small, os.environ.get("XLA_FLAGS", "")]).strip()
    import jax

    default = os.environ.get("JAX_COMPILATION_CACHE_DIR") or Path.home() / ".cache" / "sdjax" / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(folder or default))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _knows_quick() -> bool:
    """Returns whether this XLA has QUICK's flags, since an unknown flag would end the program."""
    return importlib.metadata.version("jaxlib") < "0.11"
