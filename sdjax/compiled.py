"""Compiled programs kept on disk, so that the second start of a program does not compile again."""

import os
from pathlib import Path


def keep(folder=None):
    """Lets JAX keep compiled programs in `folder`, by default ~/.cache/sdjax/compiled; for programs, not imports.

    JAX_COMPILATION_CACHE_DIR, where set, goes before the default.  The folder is trusted: whoever can write there can
    run code.
    """
    import jax

    default = os.environ.get("JAX_COMPILATION_CACHE_DIR") or Path.home() / ".cache" / "sdjax" / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(folder or default))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
