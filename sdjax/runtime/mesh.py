"""Runs a step on one device, on a mesh, or by pmap: places arrays and compiles.

    place, run = compile(step, "mesh:data=2,fsdp=2,tensor=2", batch_size=16)
    state, frozen = place.state(state), place.frozen(frozen)
    state, metrics = run(state, frozen, place.batch(batch))
    host = place.whole(state)

The losses equal those of one device, because randomness belongs to the example and the loss is a mean over the batch.
A mesh may span several processes.  Each of them provides its own rows of a batch, see `rows`.
It may span several slices, which a slower network connects: "data" goes across slices, "fsdp" and "tensor" stay within
one.
"""

import collections
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from sdjax.models.kernels.divided import ROWS

SHARD_FROM = 4 << 20  # bytes; smaller leaves are copied to every device
AXIS = "data"
AXES = ("data", "fsdp", "tensor")
NONE = "-"  # in a rule: a dimension that is not divided
Rules = Sequence[tuple[str, str]]
# Megatron-LM (arXiv:1909.08053, section 3): a pair of layers divides its inner width, so it needs one sum.
RULES: Rules = (
    (r"(to_[qkv]|[qkv]_proj|fc1|net\.0\.proj|conv1|linear_1)\.kernel$", "-,tensor"),
    (r"(to_out\.0|out_proj|fc2|net\.2|conv2|linear_2)\.kernel$", "tensor,-"),
)
Step = Callable[..., tuple[Any, Any]]  # (state, frozen, batch, axis=None) -> (state, metrics)


class Run(Protocol):
    """A compiled step; `lower` is jax.jit's, to compile it alone."""

    def __call__(self, state: Any, frozen: Any, batch: Any, /) -> tuple[Any, Any]: ...

    def lower(self, state: Any, frozen: Any, batch: Any, /) -> Any: ...


class Place(NamedTuple):
    """Functions of a mode that lay out the state, the frozen tree and a batch, and return the state.

    batch: takes this process's rows.  gather: one copy, which may be spread over devices and processes.
    whole: one copy that this process can use alone; all processes must call it.
    """

    state: Callable[[Any], Any]
    frozen: Callable[[Any], Any]
    batch: Callable[[Any], Any]
    gather: Callable[[Any], Any]
    whole: Callable[[Any], Any]


def parse(text: str) -> tuple[str, dict[str, int]]:
    """Returns (mode, {axis: size}) of "single", "pmap", "mesh" or "mesh:data=2,fsdp=2,tensor=2".

    Raises ValueError for anything else, for too many devices, and for modes that several processes do not support.
    """
    mode, _, rest = text.partition(":")
    try:
        axes = {name: int(size) for name, size in (item.split("=") for item in rest.split(",") if item)}
    except ValueError:
        axes = None
    if (
        mode not in ("single", "mesh", "pmap")
        or axes is None
        or set(axes) - set(AXES)
        or (axes and mode != "mesh")
        or any(size < 1 for size in axes.values())
    ):
        raise ValueError(f"parallel={text!r}: accepted are single, pmap, mesh, mesh:data=N,fsdp=M,tensor=K")
    needed, there, several = math.prod(axes.values()), jax.device_count(), jax.process_count()
    if needed > there:
        raise ValueError(f"parallel={text!r}: needs {needed} devices; there are {there}")
    if several > 1 and mode != "mesh":
        raise ValueError(f"parallel={text!r}: runs in one process; {several} processes take mesh, or mesh:data=N,...")
    if several > 1 and axes and needed != there:
        raise ValueError(f"parallel={text!r}: {several} processes take all of their {there} devices, not {needed}")
    if axes:
        _within(f"parallel={text!r}", jax.devices()[:needed], {name: axes.get(name, 1) for name in AXES})
    return mode, axes


def sizes(parallel: str) -> dict[str, int]:
    """Returns {axis: size} of a mode's devices; raises the errors of `parse`."""
    mode, axes = parse(parallel)
    if mode == "single" or axes:
        return {name: axes.get(name, 1) for name in AXES}
    return {"data": jax.device_count(), "fsdp": 1, "tensor": 1}


def count(parallel: str) -> int:
    """Returns the number of parts of a batch in a mode; raises the errors of `parse`."""
    found = sizes(parallel)
    return math.prod(found[name] for name in ROWS)


def described(parallel: str) -> str:
    """Returns the devices of a mode in words: "1 cpu", "8 tpu (mesh: data=4, fsdp=2)"; raises the errors of `parse`."""
    (mode, axes), devices = parse(parallel), math.prod(sizes(parallel).values())
    shape = ", ".join(f"{name}={size}" for name, size in axes.items())
    shape = "" if mode == "single" else f" ({mode}{f': {shape}' * bool(shape)})"
    hosts = f" of {jax.process_count()} processes" * (jax.process_count() > 1)
    parts = len(slices(jax.devices()[:devices]))
    hosts += f" in {parts} slices" * (mode == "mesh" and parts > 1)
    return f"{devices} {jax.devices()[0].platform}{hosts}{shape}"


def slices(devices: Sequence[Any]) -> list[int]:
    """Returns the number of these devices in each slice, in the slices' order; one number without slices."""
    counted = collections.Counter(getattr(device, "slice_index", 0) for device in devices)
    return [counted[index] for index in sorted(counted)]


def _within(said, devices, axes):
    """Raises ValueError unless only "data" goes across slices, and all slices have the same size."""
    held = slices(devices)
    if len(held) == 1:
        return
    if len(set(held)) > 1:
        raise ValueError(f"{said}: takes {held} devices of the slices; expected as many of each")
    if axes["data"] % len(held):
        raise ValueError(
            f"{said}: data={axes['data']} on {len(held)} slices; expected a multiple of {len(held)}, "
            f"since fsdp and tensor stay within a slice of {held[0]} devices"
        )


def rows(parallel: str, batch_size: int) -> Sequence[int]:
    """Returns the rows of a global batch that this process decodes, ascending; a single process decodes all.

    Raises ValueError if the devices do not divide the batch.
    """
    parts = count(parallel)
    if batch_size % parts:
        raise ValueError(
            f"data.batch={batch_size}: parallel={parallel!r} spreads it over {parts} devices, which must divide it"
        )
    if jax.process_count() == 1:
        return range(batch_size)
    placed = NamedSharding(meshed(sizes(parallel)), PartitionSpec(ROWS))
    indices = filter(None, placed.addressable_devices_indices_map((batch_size,)).values())
    return sorted({row for (span,) in indices for row in range(*span.indices(batch_size))})


def compile(step: Step, parallel: str, batch_size: int, rules: Rules = ()) -> tuple[Place, Run]:
    """Returns (Place, run): run(state, frozen, batch) is step compiled for the mode, with the state donated.

    step(state, frozen, batch, axis=None) -> (state, metrics); batch_size: rows of the global batch.
    rules: how a mesh divides leaves with matching names, checked before RULES; see `shard`.
    Raises ValueError if the devices do not divide the batch.
    """
    rows(parallel, batch_size)
    mode, _ = parse(parallel)
    if mode == "mesh":
        return on(meshed(sizes(parallel)), step, batch_size, (*rules, *RULES))
    return {"single": _single, "pmap": _pmap}[mode](step)


def _single(step: Step) -> tuple[Place, Run]:
    def same(tree):
        return tree

    return Place(same, same, same, same, same), jax.jit(step, donate_argnums=0)


def meshed(axes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Returns the Mesh of {axis: size} over devices, by default the first ones; "data" goes across slices.

    Raises ValueError for axes that do not fit the slices.
    """
    shape, kinds = tuple(axes[name] for name in AXES), (AxisType.Auto,) * len(AXES)
    devices = (jax.devices() if devices is None else devices)[: math.prod(shape)]
    _within("mesh", devices, axes)
    many = len(slices(devices))
    if many == 1:
        return jax.make_mesh(shape, AXES, axis_types=kinds, devices=devices)
    inner = shape[0] // many, *shape[1:]
    laid = mesh_utils.create_hybrid_device_mesh(inner, (many, 1, 1), devices, allow_split_physical_axes=True)
    return Mesh(laid, AXES, axis_types=kinds)


def on(mesh: Mesh, step: Step, batch_size: int, rules: Rules = RULES) -> tuple[Place, jax.stages.Wrapped]:
    """Returns the result of `compile` for a Mesh with the axes of AXES; it also lays out shapes, for lowering."""
    axes = dict(zip(mesh.axis_names, mesh.devices.shape, strict=True))
    divided, everywhere = (NamedSharding(mesh, spec) for spec in (PartitionSpec(ROWS), PartitionSpec()))

    def layout(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return NamedSharding(mesh, shard(leaf, axes, name, rules))

    def put(path, x):
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout(path, x))
        if jax.process_count() == 1:
            return jax.device_put(x, layout(path, x))
        host = np.asarray(x)  # device_put would compare the whole array between processes
        return jax.make_array_from_callback(x.shape, layout(path, x), lambda index: host[index])

    def spread(tree):
        return jax.tree_util.tree_map_with_path(put, tree)

    def divide(x):
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=divided)
        return jax.make_array_from_process_local_data(divided, np.asarray(x), (batch_size, *x.shape[1:]))

    def batch(tree):
        return jax.tree.map(divide, tree)

    def run(state, frozen, rows_of_batch):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # for kernels that XLA does not divide
            state, metrics = step(state, frozen, rows_of_batch)
        state = jax.tree_util.tree_map_with_path(
            lambda path, x: jax.lax.with_sharding_constraint(x, layout(path, x)), state
        )
        return state, jax.lax.with_sharding_constraint(metrics, everywhere)  # every process reads them

    return Place(spread, spread, batch, lambda tree: tree, _whole), jax.jit(run, donate_argnums=0)


def _whole(tree: Any) -> Any:
    return tree if jax.process_count() == 1 else multihost_utils.process_allgather(tree, tiled=True)


def shard(
    leaf: Shaped[Array, "..."] | jax.ShapeDtypeStruct, axes: Mapping[str, int], name: str = "", rules: Rules = RULES
) -> PartitionSpec:
    """Returns the PartitionSpec of a leaf over the axes "fsdp" and "tensor"; a small leaf is not divided.

    The first rule (pattern, dimensions) whose pattern matches the dotted name applies.  Its dimensions, such as
    "fsdp,tensor", name an axis or "-" for each of the leaf's last dimensions.  An axis that does not divide its
    dimension is left out.  If the rule has no "fsdp", this axis divides the largest dimension that it can.
    """
    if leaf.size * leaf.dtype.itemsize < SHARD_FROM:
        return PartitionSpec()
    said = next((words for pattern, words in rules if re.search(pattern, name)), "").split(",")
    said = [NONE] * (leaf.ndim - len(said)) + [word.strip() for word in said[-leaf.ndim :]]
    placed = [
        word if word in axes and axes[word] > 1 and n % axes[word] == 0 else None
        for word, n in zip(said, leaf.shape, strict=True)
    ]
    free = [i for i, n in enumerate(leaf.shape) if placed[i] is None and n % axes["fsdp"] == 0]
    if axes["fsdp"] > 1 and "fsdp" not in said and free:
        placed[max(free, key=lambda i: leaf.shape[i])] = "fsdp"
    return PartitionSpec(*placed) if any(placed) else PartitionSpec()


def divides(dimensions: str) -> bool:
    """Returns whether a text names an axis or "-" for each dimension, such as "fsdp,tensor", and no axis twice."""
    words = [word.strip() for word in dimensions.split(",")]
    named = [word for word in words if word != NONE]
    return set(named) <= set(AXES) and len(named) == len(set(named))


def _pmap(step: Step) -> tuple[Place, Run]:
    count = jax.local_device_count()
    copies = jax.pmap(lambda _, tree: tree, in_axes=(0, None))

    def replicate(tree):
        return copies(np.arange(count), tree)

    def batch(tree):
        return jax.tree.map(lambda x: np.asarray(x).reshape(count, -1, *np.shape(x)[1:]), tree)

    mapped = jax.pmap(
        lambda state, frozen, rows: step(state, frozen, rows, axis=AXIS), axis_name=AXIS, donate_argnums=0
    )

    return Place(replicate, replicate, batch, _first, _first), _Mapped(mapped)


@dataclass(frozen=True)
class _Mapped:
    """A step by pmap; its metrics, equal on all devices, are the first one's."""

    mapped: Any

    def __call__(self, state, frozen, batch):
        state, metrics = self.mapped(state, frozen, batch)
        return state, _first(metrics)

    def lower(self, state, frozen, batch):
        return self.mapped.lower(state, frozen, batch)


def _first(tree):
    return jax.tree.map(lambda x: x[0], tree)
