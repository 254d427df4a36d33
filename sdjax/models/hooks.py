"""Calls a network with hooks around its layers: the one place where methods reach what a layer computes.

A hook is a pytree with `intercept(part, layer, args, kwargs, at) -> output`, where `part` is "unet", "text_encoder",
..., `layer` the next call and `at` Flax's context (`at.module.name`, `at.module.path`, `at.method_name`).
"""

import contextlib
import functools

import flax.linen as nn


def apply(part, network, params, hooks, *args, **kwargs):
    """Returns network.apply(params, ...) with every hook around every layer, the first hook outermost."""
    with contextlib.ExitStack() as stack:
        for hook in hooks:
            stack.enter_context(nn.intercept_methods(functools.partial(hook.intercept, part)))
        return network.apply({"params": params}, *args, **kwargs)
