"""Calls a network with hooks around its layers, so that methods can change the output of a layer.

A hook is a pytree with `intercept(part, layer, args, kwargs, at, cond) -> output`:
    part    "unet", "text_encoder", ...
    layer   the next call
    at      Flax's context (at.module.name, at.module.path, at.method_name)
    cond    the Cond of the denoising step, with the rows of this call; None outside of a step

The core of every attention is also such a call.  Then at.method_name is "attend", and the output is [B N heads d].
args: q [B N heads d], k and v [B M heads d] and, in a text encoder, a mask.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn

from sdjax.models.cond import Cond


def apply(
    part: str, network: Any, params: Any, hooks: tuple, *args: Any, cond: Cond | None = None, **kwargs: Any
) -> Any:
    """Returns network.apply(params, ...) with every hook around every layer, the first hook outermost."""
    with contextlib.ExitStack() as stack:
        for hook in hooks:
            stack.enter_context(nn.intercept_methods(_around(hook, part, cond)))
        return network.apply({"params": params}, *args, **kwargs)


def _around(hook: Any, part: str, cond: Cond | None) -> Callable:
    """Returns a hook's interceptor in Flax's form."""
    return lambda layer, args, kwargs, at: hook.intercept(part, layer, args, kwargs, at, cond)
