"""Seamless pictures: their left and right edges meet, and their upper and lower ones.

    sd = seamless.of(sd, job.settings)       # a model whose convolutions wrap around, if the settings ask for it

Source: A1111's tiling, which sets padding_mode="circular" in every convolution of PyTorch.

Shapes: B batch, h w positions, D channels.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from sdjax.models.layers import Conv
from sdjax.sampling.settings import Task
from sdjax.stable_diffusion import StableDiffusion

NONE = (0, 0), (0, 0)


class Wrap(struct.PyTreeNode):
    """The hook that pads the inputs of convolutions with their other side, by as much as the layers pad with zeros.

    It is the outermost one, so that the hooks inside it see wrapped inputs and no padding.
    """

    def intercept(self, part: str, layer: Callable, args: tuple, kwargs: dict[str, Any], at: Any, cond: Any) -> Any:
        if isinstance(at.module, Conv) and at.method_name == "pads":
            return NONE
        if isinstance(at.module, Conv) and at.method_name == "__call__":
            args = wrapped(args[0], at.module.sides()), *args[1:]
        return layer(*args, **kwargs)


def of(sd: StableDiffusion, made: Task) -> StableDiffusion:
    """Returns the model for a picture's settings: with the hook if they ask for a seamless picture."""
    return sd.replace(hooks=(Wrap(), *sd.hooks)) if made.seamless else sd


def split(sd: StableDiffusion) -> tuple[StableDiffusion, bool]:
    """Returns (sd without the hook, whether it had it)."""
    rest = tuple(hook for hook in sd.hooks if not isinstance(hook, Wrap))
    return sd.replace(hooks=rest), len(rest) < len(sd.hooks)


def wrapped(x: Float[Array, "B h w D"], pads: Any) -> Float[Array, "B _ _ D"]:
    """Returns x [B h w D] with `pads` ((top, bottom), (left, right)) more positions, from its other side."""
    return jnp.pad(x, ((0, 0), *pads, (0, 0)), "wrap") if pads != NONE else x
