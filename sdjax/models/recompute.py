"""Rematerialisation: the values that a block keeps for its gradient; the backward pass computes the others again.

    block = recomputed(ResnetBlock, remat)(64, name="resnets.0")

    remat        a block keeps                                      computed again
    False        all values that its gradient needs                 nothing
    "products"   its input and the results of `product`             norms, activations, additions
    True         its input                                          everything

Values and gradients equal those with False up to rounding, since the same operations run in another order.
"""

from typing import Any, TypeVar

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Num

KINDS = (False, "products", True)
NAME = "product"
Block = TypeVar("Block")


def product(x: Num[Array, "..."]) -> Num[Array, "..."]:
    """Returns x, marked for "products" as the result of a matrix product, a convolution or attention."""
    return checkpoint_name(x, NAME)


def recomputed(block: type[Block], remat: bool | str) -> type[Block]:
    """Returns the class of a block with this rematerialisation, one of KINDS."""
    if not remat:
        return block
    policy: Any = jax.checkpoint_policies.save_only_these_names(NAME) if remat == "products" else None
    return nn.remat(block, policy=policy)
