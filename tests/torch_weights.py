"""PyTorch modules with noise in every weight, and the same weights as our trees; names come from our template."""

import jax.numpy as jnp
import numpy as np
import torch

from sdjax import trees

FILE_LEAF = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


def fill(module, seed=0, size=0.1):
    """Returns the module in eval mode with noise added to every parameter, so that none is zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(size * torch.randn(weight.shape, generator=generator))
    return module.eval()


def file_name(name):
    """Returns the name in a PyTorch file of our dotted name."""
    path, _, leaf = name.rpartition(".")
    return f"{path}.{FILE_LEAF.get(leaf, leaf)}"


def file_shape(name, shape):
    """Returns the shape in a PyTorch file of our leaf: [in out] -> [out in], HWIO -> OIHW."""
    if not name.endswith(".kernel"):
        return tuple(shape)
    return tuple(shape)[::-1] if len(shape) == 2 else (shape[3], shape[2], *shape[:2])


def shapes(template):
    """Returns {file name: file shape} of our template."""
    return {file_name(name): file_shape(name, leaf.shape) for name, leaf in trees.flatten(template).items()}


def tree(state, template):
    """Returns the PyTorch weights {name: tensor} as a tree like `template`; both must have the same names."""
    wanted = {file_name(name): name for name in trees.flatten(template)}
    assert set(wanted) == set(state), set(wanted) ^ set(state)
    return trees.unflatten({wanted[name]: leaf(wanted[name], value) for name, value in state.items()}, template)


def leaf(name, value):
    """Returns a PyTorch weight in our layout."""
    value = value.detach().numpy()
    if name.endswith(".kernel"):
        value = value.T if value.ndim == 2 else value.transpose(2, 3, 1, 0)
    return jnp.array(value)


def to_torch(x):
    """Returns channels-last pictures as a PyTorch tensor, channels first."""
    return torch.tensor(np.array(x)).permute(0, 3, 1, 2)


def from_torch(x):
    """Returns PyTorch pictures, channels first, as a channels-last array."""
    return x.detach().permute(0, 2, 3, 1).numpy()


def assert_close(ours, theirs, tolerance=1e-5):
    """Asserts that two arrays differ by at most `tolerance` of the second's largest number."""
    theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else theirs
    assert ours.shape == theirs.shape
    assert np.abs(np.asarray(ours) - theirs).max() <= tolerance * np.abs(theirs).max()
