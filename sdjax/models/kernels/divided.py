"""How a mesh (jax.set_mesh, jax.sharding.use_abstract_mesh) divides what kernels compute."""

import jax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Num

ROWS = ("data", "fsdp")  # axes that divide the rows of a batch


def free(mesh: jax.sharding.AbstractMesh) -> dict[str, int]:
    """Returns {axis: size} of a mesh's axes that XLA divides; where another is manual, arrays are parts already."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name: mesh.shape[name] for name, kind in kinds if kind == AxisType.Auto}


def by_rows(x: Num[Array, "B ..."]) -> Num[Array, "B ..."]:
    """Returns x, which the mesh divides by its rows alone.

    Left to itself, XLA divides the channels of convolutions too where kernels are divided, and where a mesh has three
    axes of 2 their sums are then wrong (JAX 0.10.2 on CPUs).
    """
    axes = {name: size for name, size in free(jax.sharding.get_abstract_mesh()).items() if name in ROWS and size > 1}
    return jax.lax.with_sharding_constraint(x, PartitionSpec(tuple(axes))) if axes else x
