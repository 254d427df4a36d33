"""Starts training from a LoRA file: its factors become the initial values."""

from typing import Any

import jax.numpy as jnp

from sdjax import trees
from sdjax.methods.adapter import Adapter
from sdjax.methods.lora import Lora
from sdjax.methods.method import Method
from sdjax.settings import SettingError


def started(adapter: Adapter, method: Method, trained: Any) -> Any:
    """Returns {part: {module: factors}} like `trained` with the file's values, float32.

    Raises SettingError if the file's layers, kind, rank or alpha differ from the method's.
    """
    if not isinstance(method, Lora):
        raise SettingError("class", type(method).__name__, "Lora, which trains such files")
    if method.init != "default":
        raise SettingError("init", method.init, "default, where training starts from a file")
    given = {(part, name.removesuffix(".kernel")) for part, edits in adapter.edits.items() for name in edits}
    wanted = {(part, module) for part, modules in trained.items() for module in modules}
    odd = sorted(".".join(place) for place in given ^ wanted)
    if odd:
        raise SettingError("targets", method.targets, f"the file's layers; different are {trees.listing(odd, 3)}")

    def factors(part, module, own):
        held, there = adapter.edits[part][f"{module}.kernel"].factors, f"{part}.{module}"
        if not own.keys() <= held.keys() or any(held[name].size != own[name].size for name in own):
            shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in held.items() if x.ndim)
            raise SettingError("algo, rank", (method.algo, method.rank), f"the file's, which has {shapes} at {there}")
        scale, count = method.scale_of(own), float(held.get("scale", 1.0))
        if scale is not None and abs(count - scale) > 1e-6 * abs(scale):
            raise SettingError("alpha", method.alpha, f"the file's, {count:g} times the rank at {there}")
        return {name: jnp.asarray(held[name], jnp.float32).reshape(x.shape) for name, x in own.items()}

    return {
        part: {module: factors(part, module, own) for module, own in modules.items()}
        for part, modules in trained.items()
    }
