"""The interface of a model for the loss and the wrappers; StableDiffusion provides it."""

from collections.abc import Callable
from typing import Any, Protocol

from jaxtyping import Array, Float, Int, Key, Num

from sdjax.models.cond import Cond

# (z, t, cond) -> prediction: everything inside a wrapper
Predict = Callable[[Float[Array, "B h w c"], Num[Array, " B"], Cond], Float[Array, "B h w c"]]


class Model(Protocol):
    """A latent diffusion model; see stable_diffusion.StableDiffusion."""

    @property
    def schedule(self) -> Any: ...

    @property
    def hooks(self) -> tuple[Any, ...]: ...

    def encode(
        self, pixels: Float[Array, "B H W 3"], keys: Key[Array, " B"] | None = None
    ) -> Float[Array, "B h w c"]: ...

    def latents(
        self, moments: Float[Array, "B h w 2*c"], keys: Key[Array, " B"] | None = None
    ) -> Float[Array, "B h w c"]: ...

    def condition(self, ids: dict[str, Int[Array, "B L"]], skip: int = 0) -> Cond: ...

    def denoise(
        self, z: Float[Array, "B h w c"], t: Num[Array, " B"], cond: Cond, i: Int[Array, ""] | int = 0
    ) -> tuple[Float[Array, "B h w c"], dict[str, Any]]: ...
