"""Division of kernels' arrays over a mesh (jax.set_mesh, jax.sharding.use_abstract_mesh)."""

import math

import jax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Num

ROWS = ("data", "fsdp")  # axes that divide the rows of a batch


def free(mesh: jax.sharding.AbstractMesh) -> dict[str, int]:
    """Returns {axis: size} of the mesh axes that XLA divides; along manual axes, arrays are already parts."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name: mesh.shape[name] for name, kind in kinds if kind == AxisType.Auto}


def parts(names: tuple[str, ...] = ROWS) -> int:
    """Returns the number of parts that the mesh axes `names` divide an array's axis into."""
    axes = free(jax.sharding.get_abstract_mesh())
    return math.prod(size for name, size in axes.items() if name in names)


def rows(batch: int) -> int:
    """Returns the rows of a batch on each device: all of them if the mesh does not divide them evenly."""
    return batch if batch % parts() else batch // parts()


def by_rows(x: Num[Array, "B ..."]) -> Num[Array, "B ..."]:
    """Returns x, constrained so that the mesh divides only its rows.

    If kernels are divided, XLA would also divide the channels of convolutions.  On a mesh with three axes of 2, their
    sums are then wrong (JAX 0.10.2 on CPUs).
    """
    axes = {name: size for name, size in free(jax.sharding.get_abstract_mesh()).items() if name in ROWS and size > 1}
    return jax.lax.with_sharding_constraint(x, PartitionSpec(tuple(axes))) if axes else x
