"""Runs a step on one device, on a mesh, or by pmap: places arrays and compiles.

    place, run = compile(step, "mesh:data=2,fsdp=2", batch_size=16)
    state, frozen = place.state(state), place.frozen(frozen)
    state, metrics = run(state, frozen, place.batch(batch))
    host = place.gather(state)

The losses equal those of one device, because randomness belongs to the example and the loss is a mean over the batch.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

SHARD_FROM = 4 << 20  # bytes; smaller leaves are copied to every device
AXIS = "data"
Step = Callable[..., tuple[Any, Any]]  # (state, frozen, batch, axis=None) -> (state, metrics)
Run = Callable[[Any, Any, Any], tuple[Any, Any]]  # (state, frozen, batch) -> (state, metrics)


class Place(NamedTuple):
    """How a mode lays out the state, the frozen tree and a batch, and brings the state back."""

    state: Callable[[Any], Any]
    frozen: Callable[[Any], Any]
    batch: Callable[[Any], Any]
    gather: Callable[[Any], Any]


def parse(text: str) -> tuple[str, dict[str, int]]:
    """Returns (mode, {axis: size}) of "single", "pmap", "mesh" or "mesh:data=2,fsdp=2".

    Raises ValueError for anything else, or more devices than there are.
    """
    mode, _, rest = text.partition(":")
    try:
        axes = {name: int(size) for name, size in (item.split("=") for item in rest.split(",") if item)}
    except ValueError:
        axes = None
    if (
        mode not in ("single", "mesh", "pmap")
        or axes is None
        or set(axes) - {"data", "fsdp"}
        or (axes and mode != "mesh")
        or any(size < 1 for size in axes.values())
    ):
        raise ValueError(f"parallel={text!r}: accepted are single, pmap, mesh, mesh:data=N,fsdp=M")
    if math.prod(axes.values()) > jax.device_count():
        raise ValueError(f"parallel={text!r}: needs {math.prod(axes.values())} devices; there are {jax.device_count()}")
    return mode, axes


def count(parallel: str) -> int:
    """Returns the number of devices that a mode spreads a batch over; raises what `parse` raises."""
    mode, axes = parse(parallel)
    return 1 if mode == "single" else math.prod(axes.values()) if axes else jax.device_count()


def described(parallel: str) -> str:
    """Returns the devices of a mode in words: "1 cpu", "8 tpu (mesh: data=4, fsdp=2)"; raises what `parse` raises."""
    (mode, axes), devices = parse(parallel), count(parallel)
    shape = ", ".join(f"{name}={size}" for name, size in axes.items())
    shape = "" if mode == "single" else f" ({mode}{f': {shape}' * bool(shape)})"
    return f"{devices} {jax.devices()[0].platform}{shape}"


def compile(step: Step, parallel: str, batch_size: int) -> tuple[Place, Run]:
    """Returns (Place, run): run(state, frozen, batch) is step compiled for the mode, with the state donated.

    step(state, frozen, batch, axis=None) -> (state, metrics); batch_size: rows of the global batch.
    Raises ValueError when the devices do not divide the batch.
    """
    (mode, axes), devices = parse(parallel), count(parallel)
    if batch_size % devices:
        raise ValueError(
            f"data.batch={batch_size}: parallel={parallel!r} spreads it over {devices} devices, which must divide it"
        )
    return {"single": _single, "mesh": _mesh, "pmap": _pmap}[mode](step, axes or {"data": devices, "fsdp": 1})


def _single(step: Step, axes: dict[str, int]) -> tuple[Place, Run]:
    def same(tree):
        return tree

    return Place(same, same, same, same), jax.jit(step, donate_argnums=0)


def _mesh(step: Step, axes: dict[str, int]) -> tuple[Place, Run]:
    sizes = (axes.get("data", 1), axes.get("fsdp", 1))
    mesh = jax.make_mesh(
        sizes, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[: math.prod(sizes)]
    )
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))

    def layout(leaf):
        return NamedSharding(mesh, shard(leaf, sizes[1]))

    def spread(tree):
        return jax.tree.map(lambda x: jax.device_put(x, layout(x)), tree)

    def batch(tree):
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows, np.asarray(x)), tree)

    def run(state, frozen, rows_of_batch):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # for kernels that XLA does not divide
            state, metrics = step(state, frozen, rows_of_batch)
        return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, layout(x)), state), metrics

    return Place(spread, spread, batch, lambda tree: tree), jax.jit(run, donate_argnums=0)


def shard(leaf: Shaped[Array, "..."] | jax.ShapeDtypeStruct, size: int) -> PartitionSpec:
    """Returns the PartitionSpec of a leaf over "fsdp": its largest axis that `size` divides, if the leaf is large."""
    if size == 1 or leaf.size * leaf.dtype.itemsize < SHARD_FROM:
        return PartitionSpec()
    divisible = [i for i, n in enumerate(leaf.shape) if n % size == 0]
    if not divisible:
        return PartitionSpec()
    best = max(divisible, key=lambda i: leaf.shape[i])
    return PartitionSpec(*("fsdp" if i == best else None for i in range(leaf.ndim)))


def _pmap(step: Step, axes: dict[str, int]) -> tuple[Place, Run]:
    count = jax.local_device_count()
    copies = jax.pmap(lambda _, tree: tree, in_axes=(0, None))

    def replicate(tree):
        return copies(np.arange(count), tree)

    def batch(tree):
        return jax.tree.map(lambda x: np.asarray(x).reshape(count, -1, *np.shape(x)[1:]), tree)

    def first(tree):
        return jax.tree.map(lambda x: x[0], tree)

    mapped = jax.pmap(
        lambda state, frozen, rows: step(state, frozen, rows, axis=AXIS), axis_name=AXIS, donate_argnums=0
    )

    def run(state, frozen, rows):
        state, metrics = mapped(state, frozen, rows)
        return state, first(metrics)

    return Place(replicate, replicate, batch, first), run
