"""The trained tree of any method, in trained.safetensors with the class's name; only the method's code can use it.

A leaf's name is its path in the tree, such as "head.final.kernel".  The code comes from the user's recipe, never from
the file.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax import trees
from sdjax.formats.adapters.adapter_file import File
from sdjax.formats.adapters.format import Format
from sdjax.formats.storage import files
from sdjax.methods.adapter import Adapter
from sdjax.settings import SettingError
from sdjax.stable_diffusion import StableDiffusion

NAME, MARK = "trained.safetensors", "sdjax.trained"


class Trained(Format):
    """The trained tree of a method that has no format of its own, under dotted names."""

    name = "trained"

    def matches(self, file: File) -> bool:
        """Returns whether a file's metadata name this format."""
        return file.metadata.get("format") == MARK

    def holds(self, adapter: Adapter) -> bool:
        """Returns whether the adapter is such a tree and nothing else."""
        return set(adapter.trees) == {"trained"} and not (adapter.edits or adapter.words) and adapter.hook is None

    def read(self, file: File, sd: StableDiffusion) -> Adapter:
        """Returns the leaves by name; only the method knows their tree."""
        about = {"method": file.metadata["method"], "settings": json.loads(file.metadata["settings"])}
        return Adapter(trees={"trained": file.content}, about=about)

    def write(self, adapter: Adapter, folder: Path, about: Mapping[str, str] | None = None) -> Path:
        """Writes trained.safetensors and returns its path."""
        tensors = {
            name: files.Tensor(leaf.shape, leaf.dtype.name, lambda leaf=leaf: np.asarray(leaf))
            for name, leaf in _named(adapter.trees["trained"]).items()
        }
        who = {"method": adapter.about["method"], "settings": json.dumps(adapter.about["settings"])}
        path = Path(folder) / NAME
        with files.new_file(path) as temporary:
            files.write_safetensors(temporary, tensors, {**(about or {}), "format": MARK, **who})
        return path

    def start(
        self, adapter: Adapter, method: Any, trained: Any, frozen: StableDiffusion
    ) -> tuple[Any, StableDiffusion]:
        """Returns (trained, frozen) with the file's leaves as initial values."""
        if adapter.about["method"] != type(method).__name__:
            raise SettingError("class", type(method).__name__, f"{adapter.about['method']}, which wrote the file")
        found, wanted = adapter.trees["trained"], _named(trained)
        shapes = [{name: tuple(leaf.shape) for name, leaf in tree.items()} for tree in (found, wanted)]
        if shapes[0] != shapes[1]:
            odd = sorted(name for name in shapes[0] | shapes[1] if shapes[0].get(name) != shapes[1].get(name))
            raise ValueError(f"its weights are not this method's: {trees.listing(odd)}")
        leaves = [jnp.asarray(found[name]) for name in wanted]
        return jax.tree.unflatten(jax.tree.structure(trained), leaves), frozen

    def use(self, path: Path, adapter: Adapter, model: str) -> list[str]:
        """Returns lines on how to continue from the file, which needs the recipe's code."""
        return [f"here       python -m sdjax train RECIPE init={path}", "elsewhere  only with the method's own code"]


def _named(tree):
    """Returns {a leaf's path: leaf}."""
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in pairs}
