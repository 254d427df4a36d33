"""LoHa: D = a (A1 B1) * (A2 B2), entry by entry; a = alpha / r.

A "hada_w1_a" [out r], B "hada_w1_b" [r in ...]; files may have middles "hada_t1" [r r height width], A then [r out].
Source: Yeh et al. 2023 (arXiv 2309.14859), section 3; Hyeon-Woo et al. 2022 (FedPara); LyCORIS for the initial values.
"""

import math
from typing import Any

from jaxtyping import Array, Float32

from sdjax.methods.deltas.delta import Delta, Factors
from sdjax.methods.deltas.layer import Draw
from sdjax.methods.deltas.lora import joined

PLAIN = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})


class Loha(Delta):
    """The elementwise product of two LoRAs; its rank is up to r^2."""

    name = "loha"
    roles = (PLAIN, PLAIN | {"hada_t1", "hada_t2"})
    ranked = ("hada_w1_b",)
    multiplied = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")

    def start(self, weight: Float32[Array, "..."], rank: int, draw: Draw, settings: Any) -> dict[str, Array]:
        """Returns B1 and B2 normal with standard deviation 1, A1 with 0.1, A2 zero."""
        out, inputs = len(weight), math.prod(weight.shape[1:])
        return {
            "hada_w1_a": draw.normal(0.1, out, rank),
            "hada_w1_b": draw.normal(1.0, rank, inputs),
            "hada_w2_a": draw.zeros(out, rank),
            "hada_w2_b": draw.normal(1.0, rank, inputs),
        }

    def product(self, f: Factors) -> Float32[Array, "..."]:
        """Returns a (A1 B1) * (A2 B2)."""
        one, other = (joined(f[f"hada_w{i}_a"], f[f"hada_w{i}_b"], f.get(f"hada_t{i}")) for i in (1, 2))
        return f["scale"] * one * other
