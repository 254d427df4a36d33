"""Merges and resizes LoRAs, and extracts one from the difference of two models, by their effects on weights.

    merged([(cat, 0.8), (ink, 0.5)], sd)                      # exactly 0.8 D_cat + 0.5 D_ink: ranks add up
    merged([(cat, 0.8), (ink, 0.5)], sd, Cut(rank=16))        # the nearest one with rank 16
    resized(cat, sd, Cut(energy=0.95))
    extracted(sd, tuned, Cut(rank=32))                        # LoRA of W' - W

D is an adapter's change of a weight W at strength 1 (methods/deltas).  A mean of factors is not a mean of effects:
(B1 + B2)(A1 + A2) / 4 contains the products B1 A2 and B2 A1, which belong to neither adapter.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax import trees
from sdjax.formats.adapters.low_rank import Cut, shortened, split
from sdjax.methods.adapter import Adapter
from sdjax.methods.edits import Edit, Factored
from sdjax.models.axes import TO_FILE
from sdjax.settings import SettingError
from sdjax.stable_diffusion import StableDiffusion

PLAIN = {"down", "up", "scale"}  # factors of plain LoRA, whose effect does not depend on W
OF_BASE = {"outputs", "inputs", "whole", "pissa", "olora"}  # factors whose effect depends on W
Weighed = Sequence[tuple[Adapter, float]]


def merged(adapters: Weighed, sd: StableDiffusion, cut: Cut = Cut()) -> Adapter:
    """Returns one adapter with the effect sum_i s_i D_i and all words.  adapters: ((Adapter, s_i), ...).

    Without a cut, LoRA's factors are concatenated, B = [s_1 a_1 B_1, s_2 a_2 B_2, ...] and A = [A_1; A_2; ...], so the
    sum is exact and the ranks add up.  With a cut, each sum becomes the nearest product of that rank; LoHa, LoKr, OFT
    and DoRA need one.  Changes of biases are summed.
    Raises SettingError if a rank or the base's weights are needed but missing; ValueError for hooks, and for a word in
    two files.
    """
    found: dict[str, dict[str, Edit]] = {}
    words: dict[str, Any] = {}
    for adapter, _ in adapters:
        if adapter.hook is not None or adapter.conditioner is not None or adapter.trees:
            raise ValueError("a hypernetwork, or another kind that acts by no change of weights, cannot be merged")
        if shared := words.keys() & adapter.words.keys():
            raise ValueError(f"several adapters bring the word {min(shared)}; expected one")
        words |= adapter.words
    for part in dict.fromkeys(part for adapter, _ in adapters for part in adapter.edits):
        stacks: dict[str, list[tuple[Edit, float]]] = {}
        for adapter, strength in adapters:
            for name, edit in adapter.edits.get(part, {}).items():
                stacks.setdefault(name, []).append((edit, strength))
        weights = trees.flatten(sd.parts[part])
        found[part] = {name: _summed(stack, weights[name], cut, name) for name, stack in stacks.items()}
    return Adapter({part: edits for part, edits in found.items() if edits}, words, family=sd.family)


def resized(adapter: Adapter, sd: StableDiffusion, cut: Cut) -> Adapter:
    """Returns an adapter whose changes are the nearest ones with another rank, and with the same words.

    Raises SettingError for an empty cut, and the errors of `merged`.
    """
    _check(cut)
    return merged([(adapter, 1.0)], sd, cut)


def extracted(base: StableDiffusion, tuned: StableDiffusion, cut: Cut) -> tuple[Adapter, list[str]]:
    """Returns (a LoRA of W' - W for every linear and convolutional weight that differs, names of other differences).

    LoRA cannot change norms, biases and token embeddings, so these are the other differences.
    Raises SettingError for an empty cut, ValueError for models of different shapes or without a difference.
    """
    _check(cut)
    found, others = {}, []
    for part in [part for part in base.family.lora if part in base.parts and part in tuned.parts]:
        old, new = trees.flatten(base.parts[part]), trees.flatten(tuned.parts[part])
        kernels = [{name: leaf for name, leaf in tree.items() if name.endswith(".kernel")} for tree in (old, new)]
        shapes = [{name: leaf.shape for name, leaf in tree.items()} for tree in kernels]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{part}: the models have other shapes")
        others += [f"{part}.{name}" for name in old if name not in kernels[0] and not _equal(old[name], new.get(name))]
        for name, weight in kernels[0].items():
            change = _there(kernels[1][name]) - _there(weight)
            if change.any():
                found.setdefault(part, {})[name] = _of(*split(change.reshape(len(change), -1), cut), change.shape)
    if not found:
        raise ValueError("the models do not differ in a weight that LoRA can change")
    return Adapter(found, family=base.family), others


def _check(cut):
    """Raises SettingError for an empty cut."""
    if cut.whole:
        raise SettingError("rank", None, "a rank, a share of energy or a ratio of singular values")


def _there(weight):
    """Returns a weight as a float32 numpy array with a file's order of axes."""
    return np.asarray(weight).astype(np.float32).transpose(TO_FILE.get(weight.ndim, range(weight.ndim)))


def _equal(old, new):
    return new is not None and np.array_equal(np.asarray(old), np.asarray(new))


def _summed(stack, weight, cut, name):
    """Returns one Edit with the effect sum_i s_i D_i(W)."""
    if all(_is_plain(edit) for edit, _ in stack):
        up, down = (np.concatenate(factors, axis) for factors, axis in zip(_beside(stack), (1, 0), strict=True))
        if not cut.whole:
            up, down = shortened(up, down, cut)
        return _of(up, down, tuple(weight.shape[axis] for axis in TO_FILE[weight.ndim]))
    if len(stack) == 1 and stack[0][1] == 1 and cut.whole:
        return stack[0][0]
    change = np.sum([np.float32(strength) * _change(edit, weight, name) for edit, strength in stack], 0)
    if change.ndim == 1:
        return Factored({"diff": change, "scale": np.float32(1)})
    if cut.whole:
        raise SettingError("rank", None, f"a number: the changes of {name} are no LoRA, whose factors add up")
    return _of(*split(change.reshape(len(change), -1), cut), change.shape)


def _is_plain(edit):
    return isinstance(edit, Factored) and PLAIN <= edit.factors.keys() <= {*PLAIN, "alpha"}


def _beside(stack):
    """Returns ([s_i a_i B_i, [out r]], [A_i, [r n]])."""
    factors = [({name: np.asarray(x, np.float32) for name, x in edit.factors.items()}, s) for edit, s in stack]
    ups = [np.float32(s) * f["scale"] * f["up"].reshape(len(f["up"]), -1) for f, s in factors]
    return ups, [f["down"].reshape(len(f["down"]), -1) for f, _ in factors]


def _change(edit, weight, name):
    """Returns D(W), float32 with a file's order of axes."""
    abstract = isinstance(weight, jax.ShapeDtypeStruct)
    if abstract and OF_BASE & getattr(edit, "factors", {}).keys():
        raise SettingError("model", None, f"the base model: what is done to {name} depends on its weights")
    there = jnp.zeros([weight.shape[axis] for axis in TO_FILE.get(len(weight.shape), (0,))])
    return np.asarray(edit.change(there if abstract else jnp.asarray(_there(weight))))


def _of(up, down, shape):
    """Returns the LoRA of up [out r] and down [r n], with alpha = rank.  shape: of the weight in a file."""
    rank, ones = len(down), (1,) * (len(shape) - 2)
    factors = {"down": down.reshape(rank, *shape[1:]), "up": up.reshape(len(up), rank, *ones)}
    return Factored({**factors, "scale": np.float32(1)})
