"""LPIPS' weights: VGG16 and its linear layers, in one file or two, .safetensors or torch's.

weights = read("vgg16-397923af.pth,vgg.pth")     # or one file with both

features.N.weight        torchvision's vgg16; its classifier is left out
net.sliceK.N.weight      the same layers in the state of lpips.LPIPS(net="vgg")
linK.model.1.weight      the linear layers, in lpips' own vgg.pth or that state; lins.K are copies of them
Source of the names: torchvision; richzhang/PerceptualSimilarity, version 0.1.
"""

import os
import pathlib

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sdjax.formats.storage import checkpoints, files, parameters
from sdjax.models.critics import CONVS, Lpips
from sdjax.runtime.guard import named
from sdjax.trees import Tree

IGNORED = ("classifier.", "scaling_layer.", "lins.")
SLICES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))  # places of VGG16's convolutions, by stage
OTHER_NAMES = {
    f"net.slice{stage + 1}.{place}.{leaf}": f"features.{place}.{leaf}"
    for stage, places in enumerate(SLICES)
    for place in places
    for leaf in ("weight", "bias")
}


def read(source: str | pathlib.Path, dtype: DTypeLike | None = "float32") -> Tree:
    """Returns the parameters of critics.Lpips from a file, or from several separated by commas.

    dtype: of the parameters; None keeps each as stored.  Our own reader reads torch's files without executing code.
    Raises ValueError naming a damaged file, and weights that are missing, unexpected, misshapen or duplicate.
    """
    with named(source):
        return _read(source, dtype)


def _read(source: str | pathlib.Path, dtype: DTypeLike | None) -> Tree:
    found = {}
    for path in str(source).split(","):
        if not os.path.isfile(path):
            raise ValueError(f"perceptual={source}: {path}: no such file")
        weights, _, _ = checkpoints.opened(path)
        for name in weights.names:
            place = OTHER_NAMES.get(name, name)
            if place in found:
                raise ValueError(f"{source}: holds {place} twice")
            if not name.startswith(IGNORED):
                found[place] = weights.read(name)
    tops = [f"lin{stage}.model.1.weight" for stage in range(len(CONVS))]
    absent = [name for name in tops if name not in found or found[name].ndim != 4]
    if absent:
        raise ValueError(f"{source}: no LPIPS with VGG16: missing {parameters.trees.listing(absent)}")
    network = Lpips(tuple(found[name].shape[1] for name in tops))
    picture = jnp.zeros((1, 16, 16, 3))  # the smallest possible
    like = jax.eval_shape(lambda: network.init(jax.random.key(0), picture, picture))["params"]
    return parameters.read_tree(files.Arrays(source, found), like, dtype, sizes="VGG16 and its linear layers")
