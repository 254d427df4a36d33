"""Sampling on several devices: a copy of the model on each, and a batch split among them.

    sd = spread(sd)                                     # once; every later batch is split
    sd, place = share(sd, len(z))                       # sd on as many of its devices as divide the rows
    z = place(z)                                        # each device's rows on that device

A model that was not spread stays on its device.  A picture does not depend on the number of devices, because its noise
follows from its seed.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "pictures"  # also distinguishes these meshes from training's
T = TypeVar("T")  # a model, or any tree of arrays


def spread(sd: T, devices: Iterable[Any] | None = None) -> T:
    """Returns sd with a copy on each device, by default all of this process; one device leaves sd unchanged."""
    devices = jax.local_devices() if devices is None else list(devices)
    return sd if len(devices) == 1 else jax.device_put(sd, NamedSharding(_mesh(devices), PartitionSpec()))


def share(sd: T, rows: int) -> tuple[T, Callable[[Any], Any]]:
    """Returns (sd, place): sd on as many devices as divide `rows`, and the function that places a tree of rows.

    Nothing is copied, since each device already has the model.
    """
    mesh = next((mesh for mesh in map(_mesh_of, jax.tree.leaves(sd)) if mesh is not None), None)
    if mesh is None:
        return sd, lambda tree: tree
    count = max(n for n in range(1, mesh.size + 1) if rows % n == 0)
    mesh = _mesh(mesh.devices.flat[:count])
    whole, divided = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(AXIS))
    return jax.tree.map(lambda x: _narrowed(x, whole), sd), lambda tree: jax.device_put(tree, divided)


def count(x: object) -> int:
    """Returns the number of an array's devices."""
    return len(x.sharding.device_set) if isinstance(x, jax.Array) else 1


def _mesh(devices: Sequence[Any] | np.ndarray) -> Mesh:
    return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))


def _mesh_of(x: object) -> Mesh | None:
    mesh = getattr(getattr(x, "sharding", None), "mesh", None)
    return mesh if mesh is not None and mesh.axis_names == (AXIS,) else None


def _narrowed(x, sharding):
    """Returns a leaf with its copies on the sharding's devices only; leaves without such copies stay unchanged."""
    if count(x) <= len(sharding.device_set) or not x.is_fully_replicated:
        return x
    copies = {shard.device: shard.data for shard in x.addressable_shards}
    return jax.make_array_from_single_device_arrays(
        x.shape, sharding, [copies[device] for device in sharding.mesh.devices.flat]
    )
