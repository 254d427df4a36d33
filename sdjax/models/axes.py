"""Axes of kernels here and in PyTorch's files: [in out] here is [out in] there, and HWIO is OIHW."""

from jaxtyping import Array, Float

TO_FILE = {2: (1, 0), 4: (3, 2, 0, 1)}
FROM_FILE = {2: (1, 0), 4: (2, 3, 1, 0)}


def to_file(weight: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns a weight with a file's order of axes; a vector stays unchanged."""
    return weight.transpose(TO_FILE.get(weight.ndim, (0,)))


def from_file(weight: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns a file's weight with our order of axes; a vector stays unchanged."""
    return weight.transpose(FROM_FILE.get(weight.ndim, (0,)))
