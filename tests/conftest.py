"""What every test runs under: four CPU devices, no reused keys, no silent rank promotion, warnings are errors."""

import gc
import importlib.metadata
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
# Tiny models: compiling them is what takes time.  Later versions of XLA may not know the flags.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
if importlib.metadata.version("jaxlib") < "0.11":
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"

import jax
import pytest

# Programs that several tests, processes and runs compile alike are compiled once.
CACHE = Path(__file__).parents[1] / ".pytest_cache" / "compiled"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)
os.environ["SDJAX_HASHES"] = str(CACHE.with_name("hashes.json"))
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_debug_key_reuse", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_captured_constants_warn_bytes", 1 << 20)  # weights are arguments of a program, not part of it
LARGE = 4 << 30  # bytes
gc.set_threshold(200_000, 20, 100)  # traced programs are many small objects that live on


def pytest_addoption(parser):
    parser.addoption("--rewrite", action="store_true", help="keep the thumbnails of test_same_pictures.py anew")


def pytest_configure(config):
    """`pytest -m gpu` runs on the accelerators that are here, compiled as programs are."""
    if config.getoption("-m") == "gpu":
        jax.config.update("jax_platforms", None)
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture(autouse=True, scope="module")
def room():
    """Drops compiled programs once a test process uses more than LARGE bytes."""
    yield
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if Path("/proc/self/statm").exists() else 0
    if pages * os.sysconf("SC_PAGE_SIZE") > LARGE:
        jax.clear_caches()
        gc.collect()
