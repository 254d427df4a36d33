"""Branches beside layers: a hook that applies deltas in training, and can be folded into the weights.

    sd = sd.add(hooks=Branches({"unet": {"mid_block.attentions.0.proj_in": factors}}))
    sd = sd.fold()                                  # the same model without the hook

If a kind's `run` creates no array of a weight's size, neither does its gradient.  Layer and branch are added in
float32, even if the network computes in bfloat16: rounding would lose a change of a thousandth.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from sdjax import trees
from sdjax.methods import deltas
from sdjax.methods.deltas.layer import Drop, Layer, kept
from sdjax.methods.edits import Factored, merge
from sdjax.stable_diffusion import StableDiffusion


class Branches(struct.PyTreeNode):
    """The hook.  factors: {part: {module: {name: array}}}, see deltas.

    keys: one per example of a batch [B], for dropout; None drops nothing.  strength: factor of all changes.
    units, ranks, modules: dropout rates for single numbers, ranks and whole modules.
    """

    factors: Any
    keys: Any = None
    strength: Any = 1.0
    units: float = struct.field(pytree_node=False, default=0.0)
    ranks: float = struct.field(pytree_node=False, default=0.0)
    modules: float = struct.field(pytree_node=False, default=0.0)

    def intercept(self, part: str, layer: Callable, args: tuple, kwargs: dict[str, Any], at: Any, cond: Any) -> Any:
        name = ".".join(at.module.path)
        f = self.factors.get(part, {}).get(name) if at.method_name == "__call__" else None
        if f is None:
            return layer(*args, **kwargs)
        y = layer(*args, **{**kwargs, "wide": True})
        bias = at.module.get_variable("params", "bias")
        plain = y if bias is None else y - bias.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        more = self._run({role: jnp.asarray(x, jnp.float32) for role, x in f.items()}, args[0], plain, at.module, name)
        y = y + jnp.asarray(self.strength, jnp.float32) * more
        return y if kwargs.get("wide") else y.astype(at.module.dtype)

    def _run(self, f, x, y, module, name):
        strides = {"strides": module.strides, "pads": module.pads()} if hasattr(module, "pads") else {}
        layer = Layer(module.get_variable("params", "kernel"), jnp.dtype(module.dtype), **strides)
        if self.keys is None:
            return deltas.of(f).run(f, x, y, layer, Drop())
        keys = jax.vmap(lambda key: trees.named_key(key, name))(self.keys)
        more = deltas.of(f).run(f, x, y, layer, Drop(keys, self.units, self.ranks))
        return more * kept(keys, self.modules, "module", len(x), (1,) * (x.ndim - 1)) if self.modules else more

    def fold(self, sd: StableDiffusion) -> StableDiffusion | None:
        """Returns sd without this hook, with the changes in its weights; changed weights are float32.

        Returns None if a network computes in less than float32, since rounding could exceed the change of a weight.
        """
        narrow = any(jnp.dtype(sd.networks[part].dtype) != jnp.float32 for part in self.factors)
        return None if narrow else self.merged(sd)

    def merged(self, sd: StableDiffusion) -> StableDiffusion:
        """Returns sd without this hook, with the changes in float32 weights, for networks of any type."""
        parts = {}
        for part, modules in self.factors.items():
            stacks = {f"{name}.kernel": ((Factored(f), self.strength),) for name, f in modules.items()}
            parts[part] = merge(sd.parts[part], stacks)
        return sd.with_parts(**parts)


def merged(sd: StableDiffusion) -> StableDiffusion:
    """Returns sd with all Branches merged into float32 weights, for files."""
    for hook in sd.hooks:
        if isinstance(hook, Branches):
            sd = hook.merged(sd.replace(hooks=tuple(other for other in sd.hooks if other is not hook)))
    return sd
